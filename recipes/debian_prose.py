"""Debian's files -> documents of prose: markup is undone, what is no prose is left out.

In: the files of an extracted package. Out: documents, each a list of paragraphs; a paragraph is one
line. Tables, code and lists of names are left out by a plain rule (`is_prose`), not by parsing.
"""

import gzip
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PROSE_WORDS = 5
PROSE_LETTERS = 0.75
"""Share of a paragraph's characters that are letters, spaces or ordinary punctuation."""

_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BLOCKS = {"p", "li", "dd", "dt", "div", "h1", "h2", "h3", "h4", "td", "pre", "script", "style"}


def read(path: Path) -> str:
    """A file's text, gzip undone; the older manuals are in Latin-1."""
    content = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        content = gzip.decompress(content)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def is_prose(paragraph: str) -> bool:
    """Whether most of it is words."""
    letters = sum(char.isalpha() or char in " ,.;'" for char in paragraph)
    return paragraph.count(" ") >= PROSE_WORDS - 1 and letters >= PROSE_LETTERS * len(paragraph)


def paragraphs(text: str) -> list[str]:
    """What stands between blank lines, each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def dictionary(directory: Path) -> Iterator[list[str]]:
    """dictd: an index of headword, offset and length, in a base 64 of its own."""
    (index,), (file,) = directory.rglob("*.index"), directory.rglob("*.dict.dz")
    content = gzip.decompress(file.read_bytes())
    places = set()
    for line in index.read_text(encoding="utf-8").splitlines():
        word, offset, length = line.split("\t")
        if not word.startswith("00-database"):
            places.add((_number(offset), _number(length)))
    for first, size in sorted(places):
        entry = content[first : first + size].decode(errors="replace")
        entry = re.sub(r"\[(?:1913 Webster|PJC|WordNet[^]]*|Webster[^]]*)\]|[{}]", "", entry)
        yield paragraphs(entry)


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _BASE64.index(digit)
    return value


def fortunes(directory: Path) -> Iterator[list[str]]:
    """Files of sayings between lines that hold a % alone."""
    for path in sorted((directory / "usr/share/games/fortunes").iterdir()):
        if path.is_file() and not path.suffix:
            for saying in re.split(r"^%$", read(path), flags=re.MULTILINE):
                yield paragraphs(saying)


def markdown(directory: Path) -> Iterator[list[str]]:
    for path in _files(directory, "*.md", "*.md.gz"):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", read(path))
        yield _prose(re.sub(r"[*_`#>|\\]+", "", text))


def restructured(directory: Path) -> Iterator[list[str]]:
    """reStructuredText, without directives, fields, underlines of titles, and translations."""
    for path in _files(directory, "*.rst.gz", "*_sources/**/*.rst.txt"):
        if "translations" in path.parts:
            continue
        marks = r"^[ \t]*\.\. .*$|^[ \t]*:[^:\n]+:.*$|^([=~^\"'`#*+-])\1{2,}$"
        text = re.sub(marks, "", read(path), flags=re.M)
        text = re.sub(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", text)
        yield _prose(re.sub(r"\*\*|``?|`_+|\|", "", text))


def pod(directory: Path) -> Iterator[list[str]]:
    """Perl's manuals: indented paragraphs are code."""
    for path in _files(directory, "*.pod"):
        marks = r"^[ \t].*$|^=(?:over|back|cut|item|for|begin|end|pod|encoding).*$"
        text = re.sub(marks, "", read(path), flags=re.M)
        text = re.sub(r"^=head\d ", "", text, flags=re.M)
        for _ in range(3):  # codes stand inside each other
            text = re.sub(r"[A-KM-Z]<+ ?([^<>]*?) ?>+", r"\1", text)
            text = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
        yield _prose(text)


def manuals(directory: Path) -> Iterator[list[str]]:
    """man and mdoc: requests are lines that begin with a dot; what they typeset is kept."""
    for path in _files(directory, "usr/share/man/**/*.gz"):
        lines: list[str] = []
        display, name = False, ""
        for line in read(path).splitlines():
            if not line.startswith((".", "'")):
                lines += [] if display else [line]
                continue
            macro, _, words = line[1:].strip().partition(" ")
            if macro in ("Bd", "nf", "EX", "TS", "Ed", "fi", "EE", "TE"):
                display = macro in ("Bd", "nf", "EX", "TS")
            elif macro in ("Sh", "SH", "Ss", "SS", "Pp", "PP", "P", "LP", "sp", "TP", "IP", "It"):
                lines.append("")
            elif macro[:1].isalpha() and macro not in ("Dd", "Dt", "Os", "TH", "so", "de", "ds"):
                # mdoc names macros inside a line too: .Fl a Ar file
                kept = [word for word in words.split() if not re.fullmatch("[A-Z][a-z]", word)]
                if macro == "Nm":
                    name = name or " ".join(kept)
                    kept = kept or [name]
                lines.append(" ".join(kept).replace('"', ""))
        text = re.sub(r"\\f(?:\[\w*\]|\(..|.)|\\&|\\c$", "", "\n".join(lines), flags=re.M)
        text = text.replace("\\-", "-").replace("\\e", "\\").replace("\\(aq", "'")
        yield _prose(re.sub(r" ([,.;:)])(?=\s)", r"\1", re.sub(r"\\\(..|\\s[+-]?\d", "", text)))


def pages(directory: Path) -> Iterator[list[str]]:
    """HTML; of a book in many languages, the English pages."""
    for path in _files(directory, "*/en-US/*.html") or _files(directory, "*.html"):
        page = _Page()
        page.feed(read(path))
        yield _prose("\n\n".join(page.blocks))


def papers(directory: Path) -> Iterator[list[str]]:
    """Constitution and Declaration of Independence of the United States."""
    for path in _files(directory, "usr/share/state/*.gz"):
        yield _prose(read(path))


class _Page(HTMLParser):
    """The text of each block of a page; code and styles are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [""]
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.silent += tag in ("pre", "script", "style")
        if tag in _BLOCKS:
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in ("pre", "script", "style")
        if tag in _BLOCKS:
            self.blocks.append("")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.blocks[-1] += data


def _files(directory: Path, *patterns: str) -> list[Path]:
    found = {path for pattern in patterns for path in directory.rglob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.is_symlink())


def _prose(text: str) -> list[str]:
    return [paragraph for paragraph in paragraphs(text) if is_prose(paragraph)]
