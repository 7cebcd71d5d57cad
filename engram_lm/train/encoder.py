"""A tokenizer as documents are encoded with it: what separates them is known, and no text can
stand for it.

Each document is the separator and then its token ids, so the separator both begins a text and, as
the target after a document's last token, ends it.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.canonical import backend_of, vocabulary_size


class Encoder:
    """`content` is a tokenizer.json's; separator and padding are tokens in it, by their text."""

    def __init__(self, content: str, separator: str, padding: str | None) -> None:
        self.content = content
        self.backend = Tokenizer.from_str(content)
        self.backend.no_truncation()
        self.backend.no_padding()
        # A document that quotes "<|endoftext|>" is about it and does not end there.
        self.backend.encode_special_tokens = True
        self.separator, self.padding = separator, padding
        self.separator_id = self._id("separator", separator)
        self.padding_id = None if padding is None else self._id("padding", padding)

    @classmethod
    def open(cls, path: Path, separator: str | None = None) -> "Encoder":
        """From a tokenizer.json, or a directory with one.

        The separator is the token of that name, or else eos_token of a tokenizer_config.json beside
        it; ConfigError where neither is given. Padding is pad_token there, or None.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        backend = backend_of(file)
        specials = _specials(file.with_name("tokenizer_config.json"))
        separator = specials.get("eos_token") if separator is None else separator
        if separator is None:
            added = backend.get_added_tokens_decoder().values()
            known = ", ".join(token.content for token in added if token.special) or "none"
            raise ConfigError(
                f"{path}: no tokenizer_config.json with an eos_token says what separates "
                f"documents; give --separator TOKEN (special tokens are: {known})"
            )
        return cls(file.read_text(encoding="utf-8"), separator, specials.get("pad_token"))

    @cached_property
    def token_ids(self) -> int:
        """V: ids run from 0 to V - 1."""
        return vocabulary_size(self.backend)

    @cached_property
    def sha256(self) -> str:
        """Of the tokenizer.json."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without the separator."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def fast(self) -> PreTrainedTokenizerFast:
        """The transformers tokenizer that goes with a trained model."""
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(self.content),
            bos_token=self.separator,
            eos_token=self.separator,
            pad_token=self.padding,
        )

    def _id(self, role: str, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ConfigError(f"{role}={token!r}: the tokenizer has no such token")
        return int(token_id)


def _specials(path: Path) -> dict[str, str]:
    """Special tokens by role, as transformers writes them: text, or an object with content."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        pairs = {role: record.get(role) for role in ("eos_token", "pad_token")}
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a tokenizer_config.json ({error})") from error
    texts = {
        role: value["content"] if isinstance(value, dict) else value
        for role, value in pairs.items()
    }
    return {role: text for role, text in texts.items() if text is not None}
