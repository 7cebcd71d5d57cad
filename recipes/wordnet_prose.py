"""How a synset is worded: one document of a few English sentences, chosen by its hash."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wordnet_database import PARTS, Gloss, Key, Synset, split_gloss

LIST_WORDS = 6


@dataclass(frozen=True, kw_only=True)
class Document:
    """A rendered synset with what decides its split and its place."""

    text: str
    definition: str
    digest: str


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
