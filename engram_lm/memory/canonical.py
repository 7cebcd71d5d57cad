"""Token id -> canonical id: tokens that differ in case, accents, form or white space share one id.

A pure function of the tokenizer (section 2.2 of arXiv 2601.07372). Each token is decoded on its own
by the raw backend, without any clean-up, and normalised; ids are handed out in the order in which
the keys are first seen. A model may have more token ids than its tokenizer had, because its
embedding is padded or tokens were added later: each of those is a class of its own.
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
from engram_lm.errors import ConfigError, DataError, EngramError, whole_number

FILE_NAME = "canonical_map.safetensors"
LIMIT = 2**30
"""Canonical ids lie below it: from there on numpy draws multipliers 32 bits at a time."""
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)

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
    """The map of one tokenizer: `ids_V` (int32, CPU) holds the canonical id of every token id.

    ConfigError for what is no tensor of integers, DataError for ids that are no canonical ids.
    """

    def __init__(self, ids_V: Tensor) -> None:
        if not isinstance(ids_V, Tensor) or ids_V.dtype not in INTEGERS:
            what = ids_V.dtype if isinstance(ids_V, Tensor) else f"a {type(ids_V).__name__}"
            raise ConfigError(f"canonical map: a tensor of integers is needed, this is {what}")
        if ids_V.is_meta:
            raise ConfigError("canonical map: a tensor with values is needed, this one is meta")
        if ids_V.ndim != 1 or not len(ids_V):
            raise DataError(
                f"canonical map of shape {tuple(ids_V.shape)}: one id for each token id is needed"
            )
        wrong_V = (ids_V < 0) | (ids_V.long() >= LIMIT)  # before int32 wraps them round
        if bool(wrong_V.any()):
            token = int(wrong_V.nonzero()[0])
            raise DataError(
                f"canonical map: token id {token} has canonical id {int(ids_V[token])}; they run "
                "from 0 to 2^30 - 1"
            )
        self.ids_V = ids_V.to(device="cpu", dtype=torch.int32).contiguous()
        self._own: CanonicalMap | None = None

    @property
    def own(self) -> "CanonicalMap":
        """The tokenizer's part of a map that `grown` made; itself for any other."""
        return self if self._own is None else self._own

    def first(self, token_ids: int) -> "CanonicalMap":
        """The map of the first token ids alone; itself where it has no more."""
        return self if token_ids >= self.token_ids else CanonicalMap(self.ids_V[:token_ids])

    def grown(self, token_ids: int) -> "CanonicalMap":
        """This tokenizer's map for a model that has so many token ids, or more than it has.

        Id i beyond the V of the tokenizer is a class of its own, V' + i - V (docs/addressing.md).
        """
        token_ids = whole_number("token_ids", token_ids, least=0)
        own, more = self.own, token_ids - self.own.token_ids
        if more <= 0:
            return own
        ids_V = torch.cat([own.ids_V.long(), own.canonical_ids + torch.arange(more)])
        grown = CanonicalMap(ids_V)
        grown._own = own
        return grown

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
        return cls(torch.arange(whole_number("token_ids", token_ids, least=1)))

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `canonical_map.safetensors`: the tokenizer's part, checksum in the metadata."""
        path, own = Path(directory) / FILE_NAME, self.own
        with whole.aside(path) as partial:
            save_file({"canonical_ids": own.ids_V}, partial, metadata={"sha256": own.sha256})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CanonicalMap":
        """Reads a file of `save`. DataError if missing, damaged or not what its checksum says."""
        try:
            with safe_open(path, "pt") as file:
                recorded = (file.metadata() or {}).get("sha256")
                canonical = cls(file.get_tensor("canonical_ids"))
        except (OSError, TypeError, SafetensorError) as error:
            raise DataError(f"{path}: no canonical map can be read ({error})") from error
        except EngramError as error:
            raise DataError(f"{path}: {error}") from error
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
