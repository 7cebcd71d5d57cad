"""A corpus of about 100 MB of English prose from Debian's dictionaries, books and manuals.

    apt-get update && python recipes/debian_text.py --out runs/debian
    engram train --data runs/debian/shards --out runs/mine

Downloads the packages below (130 MB), extracts them, and writes one JSONL file for each, with the
fields `text` and `source`; then token shards with the tokenizer that ships with the package, as
`engram data` makes them. A paragraph of 100 characters or more is kept where it is first seen:
manuals repeat their boilerplate, and the kernel's documents come twice. Each package's licence
notice goes into licences/. Nothing of this is in the repository but the counts, in
results/debian_text.json.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import debian_prose as prose
from rich.console import Console
from rich.progress import track

from engram_lm import corpus
from engram_lm.studies.record import Record
from engram_lm.train.encoder import Encoder
from engram_lm.train.prepare import Request, prepare

SOURCES: dict[str, Callable[[Path], Iterator[list[str]]]] = {
    "dict-gcide": prose.dictionary,
    "dict-foldoc": prose.dictionary,
    "dict-jargon": prose.dictionary,
    "anarchism": prose.markdown,
    "debian-handbook": prose.pages,
    "miscfiles": prose.papers,
    "fortunes": prose.fortunes,
    "python3.11-doc": prose.restructured,
    "perl-doc": prose.pod,
    "linux-doc-6.1": prose.restructured,
    "freebsd-manpages": prose.manuals,
    "manpages": prose.manuals,
    "manpages-dev": prose.manuals,
    "postgresql-doc-15": prose.pages,
    "sqlite3-doc": prose.pages,
    "git-doc": prose.pages,
}
REPEATABLE = 100
"""Characters below which a paragraph may stand more than once: headings and short phrases."""


def extract(packages: Iterable[str], work: Path, console: Console) -> dict[str, Path]:
    """Package -> the directory it is extracted into. Needs apt-get and dpkg-deb."""
    archives = work / "packages"
    archives.mkdir(parents=True, exist_ok=True)
    missing = [name for name in packages if not any(archives.glob(f"{name}_*.deb"))]
    if missing:
        with console.status(f"downloading {', '.join(missing)}"):
            subprocess.run(["apt-get", "download", "-qq", *missing], cwd=archives, check=True)
    found = {}
    for name in track(list(packages), "extracting", console=console):
        found[name] = work / "extracted" / name
        (archive,) = archives.glob(f"{name}_*.deb")
        found[name].mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", archive, found[name]], check=True)
    return found


def notice(source: str, packages: dict[str, Path]) -> Path:
    """A package's copyright file; some are links into another package."""
    directory = packages[source] / "usr/share/doc" / source
    if directory.is_symlink():
        return notice(directory.readlink().name, packages)
    return directory / "copyright"


class Corpus:
    """JSONL files without repeated documents or paragraphs, and what was left out, by source."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seen: set[bytes] = set()
        self.counts: dict[str, dict[str, int]] = {}

    def add(self, source: str, documents: Iterable[list[str]]) -> None:
        names = ("documents", "bytes", "duplicate_documents", "repeated_paragraphs", "left_out")
        counts = self.counts[source] = dict.fromkeys(names, 0)
        with (self.out / f"{source}.jsonl").open("w", encoding="utf-8") as file:
            for paragraphs in documents:
                if paragraphs and not self._new("\n\n".join(["", *paragraphs])):
                    counts["duplicate_documents"] += 1
                    continue
                kept = [line for line in paragraphs if len(line) < REPEATABLE or self._new(line)]
                counts["repeated_paragraphs"] += len(paragraphs) - len(kept)
                text = "\n\n".join(kept)
                if not prose.is_prose(text):
                    counts["left_out"] += 1
                    continue
                counts["documents"] += 1
                counts["bytes"] += len(text.encode())
                file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")

    def _new(self, text: str) -> bool:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in self.seen:
            return False
        self.seen.add(digest)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/debian"))
    out = parser.parse_args().out
    record, console = Record("debian_text"), Console(stderr=True)
    packages = extract(SOURCES, out, console)
    started = time.perf_counter()
    made = Corpus(out)
    (out / "licences").mkdir(exist_ok=True)
    for source, directory in track(packages.items(), "writing prose", console=console):
        made.add(source, SOURCES[source](directory))
        shutil.copy(notice(source, packages), out / "licences" / source)
    prose_seconds = time.perf_counter() - started
    started = time.perf_counter()
    request = Request(sources=tuple(str(out / f"{source}.jsonl") for source in SOURCES))
    encoder = Encoder.open(corpus.tokenizer_file(), corpus.SEPARATOR)
    shutil.rmtree(out / "shards", ignore_errors=True)
    index = prepare(request, encoder, out / "shards", console)
    seconds = time.perf_counter() - started
    totals = {
        name: sum(counts[name] for counts in made.counts.values())
        for name in next(iter(made.counts.values()))
    }
    tokens = {
        split: sum(shard[split]["tokens"] for shard in index["shards"])
        for split in ("train", "validation")
    }
    summary = {
        **totals,
        "prose_seconds": prose_seconds,
        "train_tokens": tokens["train"],
        "validation_tokens": tokens["validation"],
        "shard_duplicates": sum(source["duplicates"] for source in index["sources"]),
        "shard_seconds": seconds,
        "tokens_per_second": sum(tokens.values()) / seconds,
    }
    archives = sorted(path.name for path in (out / "packages").iterdir())
    raw = {"sources": made.counts, "packages": archives, "shards": index["shards"]}
    record.write(summary, raw, seeds=[])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
