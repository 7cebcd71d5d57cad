"""Documents -> token shards, once: without repeats, a share held out, resumable at every shard.

What a killed process leaves is finished shards and `unfinished.sqlite`: the digests of all
documents in them and the place to go on from, committed together. Going on gives the bytes of a run
that was never interrupted, because a shard holds whole batches, counted from its own first.

Held in memory: one shard, twice while it is written, one batch, and a bounded cache of digests.
"""

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from engram_lm import whole
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.train import identity, shards
from engram_lm.train.digests import Digests
from engram_lm.train.documents import Part, parts
from engram_lm.train.encoder import Encoder

UNFINISHED = "unfinished.sqlite"
BATCH_CHARACTERS = 2**18


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be prepared. Raises ConfigError."""

    sources: tuple[str, ...]
    field: str = "text"
    """Of JSONL, Parquet and data sets."""
    config: str | None = None
    split: str = "train"
    """Both of data sets."""
    validation: float = 0.01
    """Share of documents held out, drawn by their digests."""
    shard_tokens: int = 2**26
    """A shard ends with the batch that brings it there."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ConfigError(f"validation={self.validation}: a share from 0 up to, not with, 1")
        if self.shard_tokens < 1:
            raise ConfigError(f"shard_tokens={self.shard_tokens}: at least 1")


class Place(NamedTuple):
    """The next document: number `document` of part number `part`."""

    part: int
    document: int


class Read(NamedTuple):
    """A document, where the next one is, and how many bytes of its part have been read."""

    text: str
    source: int
    next: Place
    read: int


class Pending:
    """The documents of one split since the last shard."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.dtype = encoder, shards.dtype(encoder.token_ids)
        self.ids: list[Any] = []
        self.starts: list[int] = []
        self.bytes: list[int] = []
        self.tokens = 0

    def add(self, ids: Sequence[int], size: int) -> None:
        self.ids.append(np.array([self.encoder.separator_id, *ids], dtype=self.dtype))
        self.starts.append(self.tokens)
        self.bytes.append(size)
        self.tokens += 1 + len(ids)

    def packed(self) -> shards.Packed:
        return shards.Packed(
            np.concatenate([np.empty(0, dtype=self.dtype), *self.ids]),
            np.array(self.starts, dtype=np.int64),
            np.array(self.bytes, dtype=np.int64),
        )


def prepare(request: Request, encoder: Encoder, out: Path, console: Console) -> dict[str, Any]:
    """Writes token shards of all sources into `out`; returns the index.

    Goes on where it was interrupted; what is finished is not done again. MismatchError where `out`
    was begun with another request, tokenizer or other content of the sources.
    """
    named = _named(request)
    wanted = {
        "request": json.loads(json.dumps(asdict(request))),
        "files_sha256": _sha256([[part.name, part.size, part.version] for _, part in named]),
        "tokenizer_sha256": encoder.sha256,
        "separator": encoder.separator,
        "padding": encoder.padding,
    }
    unfinished = out / UNFINISHED
    if (out / shards.INDEX).exists():
        index = shards.read_index(out)
        _same(out, index, wanted)
        unfinished.unlink(missing_ok=True)
        return index
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}") from error
    with contextlib.closing(Digests(unfinished)) as digests:
        record = digests.record()
        if record is None:
            record = {**wanted, "shards": [], "sources": _nothing(request), "place": Place(0, 0)}
        _same(out, record, wanted)
        whole.write(out / shards.TOKENIZER, encoder.content)
        writer = Writer(request, encoder, out, digests, record)
        with Bar(named, console) as bar:
            for batch in _batches(_read(named, Place(*record["place"])), writer.batch_characters):
                bar.update(batch[-1], writer.add(batch))
        writer.finish_shard()
    if not record["shards"]:
        raise DataError(f"{', '.join(request.sources)}: no document with any text")
    del record["place"]
    index = {"format": shards.FORMAT, "version": shards.VERSION, **record}
    whole.write(out / shards.INDEX, json.dumps(index, indent=1) + "\n")
    unfinished.unlink()
    return index


class Writer:
    """Batches of documents -> shards. `record` is brought up to date with each shard."""

    def __init__(
        self,
        request: Request,
        encoder: Encoder,
        out: Path,
        digests: Digests,
        record: dict[str, Any],
    ) -> None:
        self.request, self.encoder, self.out = request, encoder, out
        self.digests, self.record = digests, record
        self.batch_characters = min(BATCH_CHARACTERS, request.shard_tokens)
        self.place = Place(*record["place"])
        self.pending = self._empty()

    def add(self, batch: list[Read]) -> int:
        """Takes a batch in, and ends the shard where it is full; returns the tokens added."""
        fresh = [(document.text, split) for document in batch if (split := self._split(document))]
        encodings = self.encoder.encode([text for text, _ in fresh])
        for (text, split), ids in zip(fresh, encodings, strict=True):
            self.pending[split].add(ids, len(text.encode()))
        self.place = batch[-1].next
        if sum(split.tokens for split in self.pending.values()) >= self.request.shard_tokens:
            self.finish_shard()
        return sum(1 + len(ids) for ids in encodings)

    def finish_shard(self) -> None:
        """Writes what is pending, if anything is."""
        if not any(split.tokens for split in self.pending.values()):
            return
        packed = {name: split.packed() for name, split in self.pending.items()}
        written = self.record["shards"]
        # The shard first: killed in between, the same shard is written once more.
        written.append(shards.write(self.out, len(written), packed, self.encoder))
        self.record["place"] = self.place
        self.digests.commit(self.record)
        self.pending = self._empty()

    def _empty(self) -> dict[str, Pending]:
        return {name: Pending(self.encoder) for name in shards.SPLITS}

    def _split(self, document: Read) -> str | None:
        """Where a document goes; None for repeats and empty ones, which are counted."""
        counts = self.record["sources"][document.source]
        content = document.text.encode()
        if not content.strip():
            counts["empty"] += 1
            return None
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if not self.digests.add(digest):
            counts["duplicates"] += 1
            return None
        counts["documents"] += 1
        counts["bytes"] += len(content)
        held_out = int.from_bytes(digest[:8], "big") < self.request.validation * 2**64
        return "validation" if held_out else "train"


class Bar:
    """Progress on standard error: documents' bytes read, token ids a second, time left."""

    def __init__(self, named: list[tuple[int, Part]], console: Console) -> None:
        sizes = [part.size for _, part in named]
        self.total = None if None in sizes else sum(size or 0 for size in sizes)
        self.before = [0, *itertools.accumulate(size or 0 for size in sizes)]
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.tokens, self.started = 0, time.monotonic()
        self.task: TaskID | None = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        if self.task is not None:
            self.progress.stop()

    def update(self, last: Read, tokens: int) -> None:
        self.tokens += tokens
        rate = self.tokens / (time.monotonic() - self.started)
        note = f"{self.tokens:,} tokens, {rate / 1000:.1f}k tok/s"
        read = self.before[last.next.part] + last.read
        if self.task is None:  # what an earlier process has read is no speed of this one
            self.progress.start()
            self.task = self.progress.add_task(
                "preparing", total=self.total, completed=read, note=note
            )
        self.progress.update(self.task, completed=read, note=note)


def _named(request: Request) -> list[tuple[int, Part]]:
    """All parts, each with the number of its source."""
    return [
        (number, part)
        for number, source in enumerate(request.sources)
        for part in parts(source, field=request.field, config=request.config, split=request.split)
    ]


def _nothing(request: Request) -> list[dict[str, Any]]:
    counts = {"documents": 0, "bytes": 0, "duplicates": 0, "empty": 0}
    return [{"source": source, **counts} for source in request.sources]


def _read(named: list[tuple[int, Part]], place: Place) -> Iterator[Read]:
    for number in range(place.part, len(named)):
        source, part = named[number]
        first = place.document if number == place.part else 0
        try:
            for document, found in enumerate(part.documents(first), start=first + 1):
                yield Read(found.text, source, Place(number, document), found.read)
        except OSError as error:
            raise DataError(f"{part.name}: {error.strerror or error}") from error


def _batches(documents: Iterable[Read], characters: int) -> Iterator[list[Read]]:
    batch: list[Read] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _same(out: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    """MismatchError unless what `out` was begun with is what is asked for now."""
    found = identity.difference("", {key: recorded[key] for key in wanted}, wanted)
    if found is None:
        return
    if found.startswith("files_sha256"):
        found = "the sources have files of other names, sizes or dates than when it was begun"
    raise MismatchError(f"{out}: {found}; use another --out, or delete the directory")


def _sha256(record: Any) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
