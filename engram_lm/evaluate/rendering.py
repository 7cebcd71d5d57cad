"""Made-up worlds in a tokenizer's ids: what a model of any tokenizer can be told and asked.

A world speaks in token ids of its own, each with a word: that of id 0 stands before a text, that of
id 1 is padding. In: its documents and questions. Out: text to train on, and questions in the ids of
a tokenizer, words with a space between them. With the tokenizer of the world's own words, the same
ids again.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engram_lm.errors import DataError
from engram_lm.evaluate.answers import Question, separator_of
from engram_lm.memory.canonical import backend_of

SEPARATOR, PAD = range(2)


class World(Protocol):
    """Made up: a word for each token id, no two alike, and documents of training."""

    def words(self) -> list[str]: ...

    def documents(self, seed: int) -> Iterator[list[int]]: ...


def tokenizer_of(world: World) -> PreTrainedTokenizerFast:
    """One token a word."""
    words = world.words()
    backend = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[PAD])
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=words[SEPARATOR],
        eos_token=words[SEPARATOR],
        pad_token=words[PAD],
    )


def texts(world: World, seed: int) -> Iterator[str]:
    """The world's documents of training as text, without end. No separator stands before them: it
    is the tokenizer's, as whoever encodes them puts it."""
    words = world.words()
    for document in world.documents(seed):
        yield _said(words, document[1:])


def rendered(world: World, questions: Sequence[Question], tokenizer: Any) -> list[Question]:
    """The world's questions in a tokenizer's ids, each behind the tokenizer's separator.

    An answer is what the tokenizer makes of a space and its words. Where a word's tokens begin
    another's, as those of "name1" may begin those of "name12", an answer does not tell the two
    apart. DataError for a tokenizer that has no token for some word, that has no bos or eos token,
    or that makes one token of an answer and what stands before it.
    """
    words = world.words()
    check_known(tokenizer, [f" {word}" for word in words[PAD + 1 :]])
    separator = separator_of(tokenizer)
    prompts = [_said(words, question.prompt[1:]) for question in questions]
    answers = [_said(words, question.answer) for question in questions]
    whole = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    found = []
    for question, before, ids, text in zip(
        questions, _encoded(tokenizer, prompts), _encoded(tokenizer, whole), whole, strict=True
    ):
        if ids[: len(before)] != before or len(ids) == len(before):
            raise DataError(f"the tokenizer joins an answer to its question: ...{text[-40:]!r}")
        found.append(
            Question(
                prompt=(separator, *before), answer=tuple(ids[len(before) :]), kind=question.kind
            )
        )
    return found


def check_known(tokenizer: Any, texts: list[str]) -> None:
    """DataError for a tokenizer that has no tokens for some text, or its unknown one."""
    unknown = unknown_ids(tokenizer)
    for text, ids in zip(texts, _encoded(tokenizer, texts), strict=True):
        if not ids or unknown & set(ids):
            raise DataError(
                f"the tokenizer has no token for part of {text.strip()[:40]!r}: one that makes "
                "bytes of what it does not know, or one of just these words, is needed"
            )


def unknown_ids(tokenizer: Any) -> set[int]:
    """What the tokenizer makes of text that it does not know."""
    backend = backend_of(tokenizer)
    # Its own unknown token need not be the one that transformers was told of.
    name = getattr(backend.model, "unk_token", None)
    found = {tokenizer.unk_token_id, None if name is None else backend.token_to_id(name)}
    return found - {None}


def _said(words: Sequence[str], ids: Sequence[int]) -> str:
    return " ".join(words[id] for id in ids)


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded
