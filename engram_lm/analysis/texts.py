"""Text files as pieces that are small enough to tokenise at once.

A file is one document; of a .jsonl file each line is one, under the key "text".
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from engram_lm.errors import DataError

PIECE_BYTES = 2**20


class Piece(NamedTuple):
    """Text of a document, whole or a part of it; `read`: bytes of the file up to its end."""

    text: str
    starts: bool
    read: int


def pieces(path: Path, piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """A file's text in order, documents cut only where a line begins with no white space.

    Tokenizers that split words at white space, as those of GPT and DeepSeek do, make the same
    tokens of the pieces as of the whole. DataError names the file and line of what is no text.
    """
    held: list[str] = []
    size, read, starts = 0, 0, True
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = _decoded(line, path, number)
                if path.suffix == ".jsonl":
                    read += len(line)
                    yield Piece(_document(text, path, number), True, read)
                    continue
                if size >= piece_bytes and not text[0].isspace():
                    yield Piece("".join(held), starts, read)
                    held, size, starts = [], 0, False
                held.append(text)
                size, read = size + len(line), read + len(line)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if held:
        yield Piece("".join(held), starts, read)


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line {number} is not UTF-8 ({error.reason})") from error


def _document(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number} is not JSON ({error})") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{path}: line {number} has no "text" that is a string')
    return text


def token_ids(
    found: Iterable[Piece], backend: Tokenizer, batch_bytes: int = 2 * PIECE_BYTES
) -> Iterator[tuple[list[int], Piece]]:
    """Token ids of each piece, without special tokens, and the piece; tokenised in batches."""
    batch: list[Piece] = []
    for piece in found:
        batch.append(piece)
        if piece.read - batch[0].read >= batch_bytes:
            yield from _encoded(batch, backend)
            batch = []
    yield from _encoded(batch, backend)


def _encoded(batch: list[Piece], backend: Tokenizer) -> Iterator[tuple[list[int], Piece]]:
    texts = [piece.text for piece in batch]
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    yield from zip((encoding.ids for encoding in encodings), batch, strict=True)
