"""The new domain of recipes/retrofit.py: what the docstrings of Python's standard library say.

In: the interpreter's own .py files, tests left out. Out: for "train", "validation" and "test" their
documents. A document is a module's docstrings; the SHA-256 of the module's name says which part it
belongs to. A paragraph that repeats 13 words in a row of an earlier one is left out (one of fewer
words: all of its words), and parts come in the order above, so no held-out paragraph stands in
training. Another version of Python has another text: its checksum is recorded.
"""

import ast
import hashlib
import re
import sys
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engram_lm import corpus
from engram_lm.train.encoder import Encoder

PARTS = ("train", "validation", "test")
VALIDATION, TEST = 0.08, 0.12
"""Shares of the modules' names."""
RUN = 13
"""Words that two paragraphs may not share in one piece."""
NOT_READ = {"test", "tests", "idle_test"}

Text = dict[str, dict[str, str]]
"""Part -> module -> what its docstrings say."""


def modules() -> dict[str, Path]:
    """Every module of the standard library that is written in Python, by name, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for name in sys.stdlib_module_names:
        single = root / f"{name}.py"
        for path in [single] if single.exists() else (root / name).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if not NOT_READ & set(parts):
                found[".".join(parts)] = path
    return dict(sorted(found.items()))


def part_of(module: str) -> str:
    """Which part a module's docstrings belong to."""
    place = int(hashlib.sha256(module.encode()).hexdigest()[:8], 16) / 2**32
    if place < TEST:
        return "test"
    return "validation" if place < TEST + VALIDATION else "train"


def paragraphs(path: Path) -> list[str]:
    """Of a module's docstrings, in the order of the file."""
    with tokenize.open(path) as source:
        tree = ast.parse(source.read())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        (node.body[0].lineno, docstring)
        for node in ast.walk(tree)
        if isinstance(node, kinds) and (docstring := ast.get_docstring(node))
    ]
    return [each for _, docstring in sorted(found) for each in re.split(r"\n\s*\n", docstring)]


def runs_of(paragraph: str) -> set[str]:
    """All pieces of 13 words, whatever is between them; a shorter paragraph is one piece."""
    words = re.findall(r"\w+", paragraph.lower())
    pieces = range(max(1, len(words) - RUN + 1))
    return {" ".join(words[first : first + RUN]) for first in pieces} - {""}


def read(limit: int | None = None) -> Text:
    """The text, of at most the first `limit` modules."""
    seen: set[str] = set()
    text: Text = {part: {} for part in PARTS}
    found = list(modules().items())[:limit]
    for part in PARTS:
        for module, path in found:
            if part_of(module) == part:
                kept = []
                for paragraph in paragraphs(path):
                    runs = runs_of(paragraph)
                    if runs and not runs & seen:
                        kept.append(paragraph)
                    seen |= runs
                if kept:
                    text[part][module] = "\n\n".join(kept)
    return text


def sha256(text: Text) -> str:
    """Of every part, name and document."""
    lines = (f"{part}\0{name}\0{said}\0" for part in text for name, said in text[part].items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def encoded(documents: dict[str, str]) -> npt.NDArray[np.uint16]:
    """Token ids of the corpus's tokenizer, each document behind an `<|endoftext|>`."""
    encoder = Encoder.open(corpus.tokenizer_file(), corpus.SEPARATOR)
    ids: list[int] = []
    for encoding in encoder.backend.encode_batch_fast(list(documents.values())):
        ids += [encoder.separator_id, *encoding.ids]
    return np.array(ids, dtype=np.uint16)
