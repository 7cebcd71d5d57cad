"""Token id -> canonical id: tokens that differ in case, accents, form or white space share one id.

A pure function of the tokenizer (section 2.2 of arXiv 2601.07372). Each token is decoded on its own
by the raw backend, without any clean-up, and normalised; ids are handed out in the order in which
the keys are first seen.
"""

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor

from engram_lm import whole
from engram_lm.errors import DataError

FILE_NAME = "canonical_map.safetensors"

# A private-use character that keeps a lone space alive while Strip removes every other edge.
_SPACE = "\ue000"
_NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), _SPACE),
        normalizers.Strip(),
        normalizers.Replace(_SPACE, " "),
    ]
)


class CanonicalMap:
    """The map of one tokenizer: `ids_V` (int32, CPU) holds the canonical id of every token id."""

    def __init__(self, ids_V: Tensor) -> None:
        self.ids_V = ids_V.to(device="cpu", dtype=torch.int32).contiguous()
        if self.ids_V.ndim != 1 or not len(self.ids_V):
            raise DataError(
                f"canonical map of shape {tuple(ids_V.shape)}: one id for each token id is needed"
            )

    @property
    def token_ids(self) -> int:
        """V, how many token ids there are."""
        return len(self.ids_V)

    @cached_property
    def canonical_ids(self) -> int:
        """V', how many classes they fall into."""
        return int(self.ids_V.max()) + 1

    @cached_property
    def sha256(self) -> str:
        """Of the map as V little-endian int32: two maps of one size are told apart by it."""
        return hashlib.sha256(self.ids_V.numpy().astype("<i4").tobytes()).hexdigest()

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "CanonicalMap":
        """From a tokenizers.Tokenizer, a fast transformers tokenizer, a tokenizer.json, or a
        directory with one.

        0.6 s for 129,280 ids. DataError where there is no fast tokenizer.
        """
        backend = backend_of(tokenizer)
        token_ids = vocabulary_size(backend)
        texts = backend.decode_batch(
            [[token_id] for token_id in range(token_ids)], skip_special_tokens=False
        )
        classes: dict[str, int] = {}
        ids = []
        for token_id, text in enumerate(texts):
            if "\ufffd" in text:  # half a character: its raw form is all there is to tell it by
                key = str(backend.id_to_token(token_id))
            else:
                key = _NORMALIZER.normalize_str(text) or text
            ids.append(classes.setdefault(key, len(classes)))
        return cls(torch.tensor(ids, dtype=torch.int32))

    @classmethod
    def identity(cls, token_ids: int) -> "CanonicalMap":
        """The map of a memory that is addressed by raw token ids (Qwen4-Exp)."""
        return cls(torch.arange(token_ids, dtype=torch.int32))

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `canonical_map.safetensors`, checksum in the metadata."""
        path = Path(directory) / FILE_NAME
        with whole.aside(path) as partial:
            save_file({"canonical_ids": self.ids_V}, partial, metadata={"sha256": self.sha256})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CanonicalMap":
        """Reads a file of `save`. DataError if missing, damaged or not what its checksum says."""
        try:
            with safe_open(path, "pt") as file:
                recorded = (file.metadata() or {}).get("sha256")
                canonical = cls(file.get_tensor("canonical_ids"))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: no canonical map can be read ({error})") from error
        if canonical.sha256 != recorded:
            raise DataError(
                f"{path}: holds a map of sha256 {canonical.sha256}, its metadata says {recorded}"
            )
        return canonical


def vocabulary_size(backend: Tokenizer) -> int:
    """V, one more than the highest token id, added tokens included."""
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def backend_of(tokenizer: Any) -> Tokenizer:
    """The `tokenizers` backend of a tokenizer object, file or directory; DataError if none."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        path = Path(tokenizer)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            return Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
            raise DataError(f"{path}: not a tokenizer.json ({error})") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise DataError(
            f"{type(tokenizer).__name__}: a fast tokenizer (with a `tokenizers` backend) is needed"
        )
    return backend
