"""Whether a model gives the answers that are wanted, without generating: by teacher forcing.

Shapes: N questions, A answer tokens, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from engram_lm.errors import DataError
from engram_lm.evaluate.inference import inference

NOT_FINITE = "some of the model's logits are not finite numbers"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, what should follow, and what the two are an example of."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kind: str


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One entry a question."""

    right: npt.NDArray[np.bool_]
    """(N,): each token of the answer is the likeliest one after those before it. What greedy
    decoding gives as well."""
    tokens: npt.NDArray[np.float64]
    """(N,): share of the answer's tokens that are."""
    nats: npt.NDArray[np.float64]
    """(N,): minus the log-probability of the whole answer."""


def separator_of(tokenizer: Any) -> int:
    """The token id that stands before a text. DataError where there is no bos and no eos token."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise DataError("the tokenizer has no bos or eos token to begin a text with")


def answers(
    model: Any,
    questions: Sequence[Question],
    *,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Answers:
    """Runs each prompt with its answer once. Questions of one length share a batch, so nothing is
    padded. progress: questions so far. DataError for none, for one without prompt or answer, for
    one of more tokens than the model has positions, or of ids that it has not, and where logits are
    not finite numbers.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        if not question.prompt or not question.answer:
            raise DataError(f"question {place}: a prompt and an answer of 1 token or more each")
        groups[len(question.prompt), len(question.answer)].append(place)
    if not groups:
        raise DataError("no questions")
    _check(getattr(model, "config", None), questions)
    right = np.zeros(len(questions), dtype=bool)
    tokens, nats = np.zeros(len(questions)), np.zeros(len(questions))
    done = 0
    with inference(model):
        for (_, length), places in groups.items():
            for first in range(0, len(places), batch):
                part = places[first : first + batch]
                ids_NT = torch.tensor(
                    [[*questions[at].prompt, *questions[at].answer] for at in part],
                    device=model.device,
                )
                logits_NAV = model(
                    input_ids=ids_NT[:, :-1], use_cache=False, logits_to_keep=length
                ).logits
                wanted_NA = ids_NT[:, -length:]
                hits_NA = logits_NAV.argmax(-1) == wanted_NA
                losses = F.cross_entropy(
                    logits_NAV.flatten(0, 1).float(), wanted_NA.flatten(), reduction="none"
                )
                right[part] = hits_NA.all(1).cpu().numpy()
                tokens[part] = hits_NA.double().mean(1).cpu().numpy()
                nats[part] = losses.double().view(wanted_NA.shape).sum(1).cpu().numpy()
                done += len(part)
                if progress is not None:
                    progress(done)
    if not np.isfinite(nats).all():
        raise DataError(NOT_FINITE)
    return Answers(right=right, tokens=tokens, nats=nats)


def _check(config: Any, questions: Sequence[Question]) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    ids = getattr(config, "vocab_size", None)
    for place, question in enumerate(questions):
        tokens = len(question.prompt) + len(question.answer)
        if positions is not None and tokens > positions:
            raise DataError(
                f"question {place}: {tokens} tokens, the model has {positions} positions"
            )
        highest = max(*question.prompt, *question.answer)
        if ids is not None and highest >= ids:
            raise DataError(f"question {place}: token id {highest}, the model has {ids}")
