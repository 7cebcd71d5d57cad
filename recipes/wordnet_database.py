"""WordNet 3.0's database files, read: synsets, their relations, and glosses taken apart."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

SYNSETS = 117_659
PARTS = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "r": "data.adv"}

Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Pointer:
    """A relation from one synset to another; a word of 0 means the whole synset."""

    symbol: str
    target: Key
    source_word: int
    target_word: int


@dataclass(frozen=True, kw_only=True)
class Synset:
    """One line of a data file, its words already plain text."""

    part: str
    person: bool
    words: tuple[str, ...]
    pointers: tuple[Pointer, ...]
    gloss: str

    @property
    def name(self) -> str:
        """What identifies the synset whatever byte offsets a build of WordNet gives it."""
        return f"{self.part} {', '.join(self.words)} | {self.gloss}"


@dataclass(frozen=True, kw_only=True)
class Gloss:
    """A gloss taken apart: `(label) definition; "example"; "example"`."""

    label: str | None
    definition: str
    examples: tuple[str, ...]


def read(source: Path) -> tuple[dict[Key, Synset], str]:
    """Every synset under its (part, offset), and the licence that heads each data file."""
    synsets: dict[Key, Synset] = {}
    licence = ""
    for part, name in FILES.items():
        lines = (source / name).read_text(encoding="ascii").splitlines()
        header = [line for line in lines if line.startswith("  ")]
        licence = "\n".join(line.strip().partition(" ")[2].rstrip() for line in header) + "\n"
        for line in lines[len(header) :]:
            offset, synset = parse(part, line)
            synsets[part, offset] = synset
    if len(synsets) != SYNSETS:
        sys.exit(f"--source {source}: {len(synsets)} synsets, WordNet 3.0 has {SYNSETS}")
    return synsets, licence


def parse(part: str, line: str) -> tuple[int, Synset]:
    """The synset of one line of a data file; wndb(5WN) gives the format."""
    head, _, gloss = line.partition(" | ")
    fields = iter(head.split())
    offset, lexicographer, _ = int(next(fields)), next(fields), next(fields)
    words = [(next(fields), next(fields))[0] for _ in range(int(next(fields), 16))]
    pointers = []
    for _ in range(int(next(fields))):
        symbol, target, target_part, ends = (next(fields) for _ in range(4))
        pointers.append(
            Pointer(
                symbol=symbol,
                target=(target_part.replace("s", "a"), int(target)),
                source_word=int(ends[:2], 16),
                target_word=int(ends[2:], 16),
            )
        )
    return offset, Synset(
        part=part,
        person=lexicographer == "18",
        words=tuple(re.sub(r"\((p|a|ip)\)$", "", word).replace("_", " ") for word in words),
        pointers=tuple(pointers),
        gloss=" ".join(gloss.split()),
    )


def subject_labels(synsets: dict[Key, Synset]) -> set[str]:
    """Leading `(law)`-like labels that name a field, so that "In law, ..." says the same.

    A label is a field once some synset that bears it also points to that word as its topic;
    `(usually plural)` and `(slang)` never do.
    """
    found = set()
    for synset in synsets.values():
        label = re.match(r"\(([^()]+)\) ", synset.gloss)
        topics = {
            word for p in synset.pointers if p.symbol == ";c" for word in synsets[p.target].words
        }
        if label and label[1].lower() in {topic.lower() for topic in topics}:
            found.add(label[1])
    return found


def split_gloss(gloss: str, labels: set[str]) -> Gloss:
    """The gloss in parts, with WordNet's `quotes' made plain and its few unclosed quotes closed."""
    unclosed = gloss.count('"') % 2
    pieces = gloss.split("; ") if unclosed else re.findall(r'(?:"[^"]*"|[^;"])+', gloss)
    definitions, examples = [], []
    for number, piece in enumerate(piece.strip(" ;") for piece in pieces):
        if number and (piece.startswith('"') or (piece.endswith('"') and piece.count('"') == 1)):
            examples += split_examples(piece)
        elif piece:
            definitions.append(piece)
    definition = plain("; ".join(definitions)).rstrip(".")
    if definition.count('"') == 1:
        definition = definition.replace('"', "")
    label = re.match(r"\(([^()]+)\) (?=\w)", definition)
    if label and label[1] in labels:
        return Gloss(label=label[1], definition=definition[label.end() :], examples=tuple(examples))
    return Gloss(label=None, definition=definition, examples=tuple(examples))


def split_examples(piece: str) -> list[str]:
    """The quoted sentences of one piece of a gloss, each in quotes, its author in parentheses."""
    quotes = re.findall(r'"([^"]*)"([^"]*)', piece)
    joints = [after.strip(" ,.") for _, after in quotes[:-1]]
    if not quotes or piece.count('"') % 2 or any(joint not in ("", "or") for joint in joints):
        return [f'"{plain(piece).strip(chr(34)).replace(chr(34), chr(39))}"']
    author = quotes[-1][1].strip(" -.,()")
    examples = [f'"{plain(quote).strip(" ;,")}"' for quote, _ in quotes]
    if author:
        examples[-1] += f" ({plain(author)})"
    return examples


def plain(text: str) -> str:
    """The text with ordinary quotes and spacing."""
    text = re.sub(r"\s+([,;)])", r"\1", text.replace("`", "'").replace("_", " "))
    text = text.replace("( ", "(")
    text = re.sub(r"(?<=[a-z]),(?=[a-z])", ", ", text)
    text = re.sub(r"\s*:\s*(?=\")", ": ", text)
    return " ".join(text.split()).strip(" ;:")
