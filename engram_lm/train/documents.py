"""Where documents come from: text, JSONL and Parquet files, and Hugging Face data sets.

In: the sources a user names. Out: their parts in a fixed order, each of which gives its documents
from any number on, so that whoever was interrupted goes on without reading the rest again. A text
file is one document; a JSONL line, a Parquet row and a data set's row are one each, in one field.
Held in memory: one document, or one batch of Parquet rows.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from engram_lm.errors import ConfigError, DataError

HUB = "hf:"
ROWS = 256


class Document(NamedTuple):
    """One text, and how many bytes of its part have been read when it is here."""

    text: str
    read: int


class Part(Protocol):
    """One file or data set."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int | None:
        """Bytes, where that is known before it is read."""

    @property
    def version(self) -> int | None:
        """Changes when the content does, where that can be told."""

    def documents(self, first: int) -> Iterator[Document]:
        """From number `first` on, zero-based. DataError names the place of what is no document."""


@dataclass(frozen=True)
class _File:
    path: Path
    field: str

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def version(self) -> int:
        return self.path.stat().st_mtime_ns


class TextFile(_File):
    """A file that is one document, byte for byte."""

    def documents(self, first: int) -> Iterator[Document]:
        if first == 0:
            text = _decoded(self.path.read_bytes(), self.name)
            yield Document(text, self.size)


class JsonlFile(_File):
    """One JSON object a line; its `field` is the document."""

    def documents(self, first: int) -> Iterator[Document]:
        read = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines):
                read += len(line)
                if number < first:
                    continue
                place = f"{self.path}:{number + 1}"
                try:
                    record = json.loads(_decoded(line, place))
                except ValueError as error:
                    raise DataError(f"{place}: not a JSON object ({error})") from error
                if not isinstance(record, dict):
                    raise DataError(f"{place}: not a JSON object")
                yield Document(_text(record, self.field, place), read)


class ParquetFile(_File):
    """A table with a column of strings; row groups that were read before are left out."""

    def documents(self, first: int) -> Iterator[Document]:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise _missing(self.name, "pyarrow") from error
        try:
            with parquet.ParquetFile(self.path) as table:
                columns = table.schema_arrow.names
                if self.field not in columns:
                    raise DataError(_no_field(self.name, self.field, columns))
                yield from self._rows(table, first)
        except ArrowException as error:
            raise DataError(f"{self.path}: no Parquet table can be read ({error})") from error

    def _rows(self, table: Any, first: int) -> Iterator[Document]:
        number, rows = 0, table.metadata.num_rows
        for group in range(table.num_row_groups):
            inside = table.metadata.row_group(group).num_rows
            if number + inside <= first:
                number += inside
                continue
            for batch in table.iter_batches(ROWS, row_groups=[group], columns=[self.field]):
                for record in batch.to_pylist():
                    number += 1
                    if number > first:
                        text = _text(record, self.field, f"{self.path}, row {number}")
                        yield Document(text, self.size * number // rows)


@dataclass(frozen=True)
class HubDataset:
    """A data set that `datasets` streams: from the hub, or from a local directory."""

    dataset: str
    config: str | None
    split: str
    field: str
    size: None = None
    version: None = None

    @property
    def name(self) -> str:
        return f"{HUB}{self.dataset} ({self.config or 'default'}, {self.split})"

    def documents(self, first: int) -> Iterator[Document]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise _missing(self.name, "datasets") from error
        try:
            rows = load_dataset(self.dataset, self.config, split=self.split, streaming=True)
            read = 0
            for number, record in enumerate(rows.skip(first), start=first + 1):
                text = _text(record, self.field, f"{self.name}, row {number}")
                read += len(text.encode())
                yield Document(text, read)
        except DataError:
            raise
        # What can go wrong depends on the data set's host and file format, and so do the errors.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.name}: cannot be streamed ({reason})") from error


FORMATS: dict[str, type[TextFile] | type[JsonlFile] | type[ParquetFile]] = {
    ".txt": TextFile,
    ".md": TextFile,
    ".jsonl": JsonlFile,
    ".parquet": ParquetFile,
}


def parts(
    source: str, *, field: str = "text", config: str | None = None, split: str = "train"
) -> list[Part]:
    """The parts of one source: FILE, DIRECTORY (its files by name, at any depth), or hf:NAME.

    `config` and `split` are for hf:NAME alone. Files of other endings inside a directory are left
    out; DataError where nothing is left, or where a FILE's ending is another.
    """
    if source.startswith(HUB):
        return [HubDataset(source.removeprefix(HUB), config, split, field)]
    path, accepted = Path(source), ", ".join(FORMATS)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in FORMATS)
        if not found:
            raise DataError(f"{path}: no file in it ends with one of {accepted}")
        return [FORMATS[file.suffix](file, field) for file in found]
    if path.suffix not in FORMATS:
        raise DataError(f"{path}: its ending is none of {accepted}; {HUB}NAME is a data set")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return [FORMATS[path.suffix](path, field)]


def _decoded(content: bytes, place: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start}: {error.reason})") from error


def _text(record: dict[str, Any], field: str, place: str) -> str:
    if field not in record:
        raise DataError(_no_field(place, field, record))
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} holds {type(text).__name__}, text is needed")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise DataError(f"{place}: field {field!r} is not Unicode text ({error.reason})") from error
    return text


def _no_field(place: str, field: str, names: Iterable[str]) -> str:
    return f"{place}: no field {field!r}; there are {', '.join(map(repr, names))}"


def _missing(name: str, package: str) -> ConfigError:
    return ConfigError(f"{name}: {package} is needed: pip install 'engram-lm[data]'")
