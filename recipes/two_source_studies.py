"""The two pairs of recipes/two_source.py: what they are, what they read and what they are asked.

Shapes: T token ids, V of the vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken

from engram_lm import corpus, preset
from engram_lm.analysis.material import Material, validation
from engram_lm.evaluate.answers import Question
from engram_lm.evaluate.rendering import rendered, tokenizer_of
from engram_lm.evaluate.suites.two_source import PAD, SEPARATOR, TwoSource
from engram_lm.evaluate.suites.wordnet_facts import WordnetFacts
from engram_lm.memory.canonical import backend_of
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.presets import RHO, configure, for_vocabulary
from engram_lm.model.twin import twin

WORLD = {"entities": 1_000, "relations": 2, "values": 20}
SMALL = {**WORLD, "entities": 30}
HELD_OUT = 2_000
"""Seed of the documents that are judged; those of training have the runs' own seeds."""


class Twins:
    """The demo's twins on the documents of a world alone, one token a word."""

    name = "two_source"
    judged = 16_384
    """Tokens of held-out documents."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.world = self.world_of(SMALL if small else WORLD)
        self.tokenizer = self.made_tokenizer()

    def world_of(self, sizes: dict[str, int]) -> TwoSource:
        return TwoSource(**sizes)

    def made_tokenizer(self) -> Any:
        return tokenizer_of(self.world)

    def moe(self) -> EngramLMConfig:
        moe = preset("nano-moe")
        if self.small:
            moe = configure(moe, {"num_hidden_layers": 4, "mlp_layer_types": None})
        return moe

    def arms(self) -> dict[str, EngramLMConfig]:
        """Equal in parameters and FLOPs to 0.5 %."""
        moe = self.moe()
        vocabulary = {
            "token_ids": len(self.tokenizer),
            "separator_id": self.tokenizer.bos_token_id,
            "padding_id": self.tokenizer.pad_token_id,
        }
        engram = for_vocabulary(twin(moe, RHO), **vocabulary)
        return {
            # Documents run on into one another here, so n-grams do too.
            "Engram": configure(engram, {"memory.specification.boundary_rule": "cross"}),
            "MoE": for_vocabulary(moe, **vocabulary),
        }

    def documents(self, seed: int) -> Iterator[list[int]]:
        """In the tokenizer's ids, each behind a separator, without end."""
        return self.world.documents(seed)

    def ids(self, tokens: int, seed: int) -> npt.NDArray[np.int64]:
        """So many token ids and one more of documents behind one another."""
        ids: list[int] = []
        for document in self.documents(seed):
            ids += document
            if len(ids) > tokens:
                break
        return np.array(ids[: tokens + 1], dtype=np.int64)

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """(V,): a word counts as one byte of text."""
        return np.ones(len(self.tokenizer), dtype=np.int64)

    def material(self, training_T: npt.NDArray[np.integer], questions: int) -> Material:
        """Held-out documents; as the corpus what was trained on."""
        ids_T = self.ids(1_024 if self.small else self.judged, HELD_OUT)
        words = self.world.words()
        shown = self.world.documents(HELD_OUT + 1)
        return Material(
            text="held-out documents",
            ids_T=ids_T,
            bytes_T=np.ones(len(ids_T), dtype=np.int64),
            starts_T=ids_T == self.tokenizer.bos_token_id,
            names="every name of the world has two tokens or three",
            names_T=np.array([words[token].startswith("last") for token in ids_T]),
            corpus="the training documents",
            corpus_C=training_T.astype(np.int64),
            sentences=tuple(" ".join(words[token] for token in next(shown)[1:]) for _ in range(4)),
            suites=(self.world,),
            questions=questions,
        )

    def questions(self, number: int) -> list[Question]:
        """Of each kind and layout, in the tokenizer's ids."""
        return rendered(self.world, self.world.questions(number), self.tokenizer)


class _Said(TwoSource):
    """The same world with a stop that no text has."""

    def words(self) -> list[str]:
        return ["<stop>" if word == "." else word for word in super().words()]


class Text(Twins):
    """A pair of 8M parameters in all that reads WordNet as well: half of all tokens. The world's
    words are tokens beside the corpus's own."""

    name = "two_source_text"
    judged = 60_000

    def world_of(self, sizes: dict[str, int]) -> TwoSource:
        return _Said(**sizes)

    def made_tokenizer(self) -> Any:
        tokenizer = corpus.tokenizer()
        words = self.world.words()[PAD + 1 :]
        tokenizer.add_tokens([AddedToken(word, lstrip=True, normalized=False) for word in words])
        return tokenizer

    def moe(self) -> EngramLMConfig:
        layers = 4 if self.small else 8
        return configure(preset("nano-moe"), {"num_hidden_layers": layers, "mlp_layer_types": None})

    def documents(self, seed: int) -> Iterator[list[int]]:
        words, told = self.world.words(), [0, 0]
        own_V = np.array(self.tokenizer.convert_tokens_to_ids(words))
        own_V[[SEPARATOR, PAD]] = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
        made = (own_V[document].tolist() for document in self.world.documents(seed))
        sources = (self._text(seed), made)
        while True:  # the next is of that kind of which there is less so far
            kind = int(told[1] < told[0])
            document = next(sources[kind])
            told[kind] += len(document)
            yield document

    def _text(self, seed: int) -> Iterator[list[int]]:
        split = "validation" if seed >= HELD_OUT else "train"
        texts = corpus.documents(split)
        drawn = np.random.default_rng([4, seed])
        backend, separator = backend_of(self.tokenizer), self.tokenizer.bos_token_id
        while True:
            order = drawn.permutation(len(texts))
            for begin in range(0, len(order), corpus.BATCH_DOCUMENTS):
                batch = [texts[place] for place in order[begin : begin + corpus.BATCH_DOCUMENTS]]
                for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                    yield [separator, *encoding.ids]

    def token_bytes(self) -> npt.NDArray[np.int64]:
        own = corpus.token_bytes()
        return np.concatenate([own, np.ones(len(self.tokenizer) - len(own), dtype=np.int64)])

    def material(self, training_T: npt.NDArray[np.integer], questions: int) -> Material:
        """WordNet's validation documents alone: real text with real names."""
        return Material(
            **validation(self.tokenizer, (1_024 if self.small else self.judged) + 1),
            corpus="the training documents",
            corpus_C=training_T.astype(np.int64),
            suites=(self.world, WordnetFacts()),
            questions=questions,
        )


STUDIES = {"twins": Twins, "text": Text}
