"""Text as HTML, whatever a model may have written."""

import html
import re

# NUL and its like are not allowed in a page, not even as references.
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def escape(text: str) -> str:
    """For element content and quoted attributes; characters that no page may hold become U+FFFD."""
    return html.escape(_FORBIDDEN.sub("\ufffd", text), quote=True)
