"""A model as lm_eval takes it. Imports lm_eval, an extra: see `harness`."""

from typing import Any

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

STRIDE = 16
"""Batches of whole texts between two steps of their progress bar."""


class HarnessReader(HFLM):
    """HFLM on a model's object, with one progress bar for whole texts where HFLM has one a batch.

    The model is put into eval mode. batch: requests that are read at once.
    """

    def __init__(self, model: Any, tokenizer: Any, batch: int = 1) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each after the tokenizer's first token."""
        stride = STRIDE * self.batch_size
        answers: list[float] = []
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood_rolling requests"
        ) as bar:
            for start in range(0, len(requests), stride):
                part = requests[start : start + stride]
                answers += super().loglikelihood_rolling(part, disable_tqdm=True)
                bar.update(len(part))
        return answers

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        # Only whole texts come with a batch of their own.
        return super()._loglikelihood_tokens(
            requests, disable_tqdm=disable_tqdm or override_bs is not None, override_bs=override_bs
        )
