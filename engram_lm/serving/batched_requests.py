"""Requests to one model that are generated together: those that wait while a batch is generated
make the next one, each with its own packs, length and end."""

import asyncio
import copy
import json
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from fastapi import HTTPException
from torch import Tensor
from transformers import EosTokenCriteria, StoppingCriteria, StopStringCriteria
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    _GenerationCancelled,
    _StreamError,
)
from transformers.generation.configuration_utils import GenerationMode

TOGETHER = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""Ways of generating in which a request is one row of a batch; others generate one at a time."""


class WithPacks:
    """A model as one model name asks for it: `generate` reads these packs."""

    def __init__(self, model: Any, packs: tuple[str, ...]) -> None:
        self.model, self.packs = model, packs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """For one prompt."""
        if self.packs:
            kwargs["packs"] = [self.packs]
        return self.model.generate(*args, **kwargs)


class Request:
    """A prompt, what it is generated with, and who hears of its tokens.

    ids_T: int64. put: told each token's id; raises _GenerationCancelled when nobody listens. end:
    told once, what went wrong or None.
    """

    def __init__(
        self,
        model: WithPacks,
        ids_T: Tensor,
        config: Any,
        put: Callable[[Tensor], None],
        end: Callable[[Exception | None], None],
    ) -> None:
        self.model, self.ids_T, self.config, self.put, self.end = model, ids_T, config, put, end
        self.tokens = 0
        self.kind = json.dumps({**config.to_dict(), "max_new_tokens": None}, default=str)
        """Requests of one kind differ in prompt, packs and length alone."""

    def take(self, token: Tensor, last: bool) -> bool:
        """Hands on a token; False after the last, or when nobody listens."""
        try:
            self.put(token)
        except Exception as error:
            self.end(error)
            return False
        self.tokens += 1
        last |= self.tokens == self.config.max_new_tokens
        if last:
            self.end(None)
        return not last


class Ends(StoppingCriteria):
    """Where each row of a batch ends; hands every new token to its request until then."""

    def __init__(self, batch: list[Request]) -> None:
        self.open: list[Request | None] = [*batch]
        self.criteria: list[Any] = []

    def look_for(self, eos: Any, stop: Any, tokenizer: Any) -> None:
        """Rows end at these token ids and behind these texts, too; None for none."""
        if eos is not None:
            self.criteria.append(EosTokenCriteria(eos))
        if stop is not None:
            self.criteria.append(StopStringCriteria(tokenizer, stop))

    def __call__(self, input_ids: Tensor, scores: Any, **_options: Any) -> Tensor:
        """bool, (rows,): True where a row has ended."""
        last_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            last_B |= criterion(input_ids, scores)
        tokens, last = input_ids[:, -1:].cpu(), last_B.tolist()
        for row, request in enumerate(self.open):
            if request is not None and not request.take(tokens[row], last[row]):
                self.open[row] = None
        return torch.tensor([each is None for each in self.open], device=input_ids.device)


class InBatches(GenerateManager):
    """Generates for at most `most` requests at once, on one thread, within the model's context.

    Those that sample draw from one generator: a request's seed alone does not fix its text.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.waiting: deque[Request] = deque()
        self.lock = threading.Lock()

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        """HTTP 400 for a prompt that is empty or too long."""
        _fit(model, inputs, gen_config)
        if gen_config.get_generation_mode() not in TOGETHER:
            return super().generate_streaming(
                model, processor, inputs, gen_config, request_id, response_parser
            )
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        streamer = DirectStreamer(processor._tokenizer, loop, queue, response_parser)
        streamer.put(inputs["input_ids"])  # the prompt, which it leaves out

        def end(error: Exception | None) -> None:
            if error is None:
                streamer.end()
            else:
                gone = isinstance(error, _GenerationCancelled)
                loop.call_soon_threadsafe(
                    queue.put_nowait, None if gone else _StreamError(str(error))
                )

        self.ask(Request(model, inputs["input_ids"][0], gen_config, streamer.put, end), processor)
        return queue, streamer

    async def generate_non_streaming(  # type: ignore[override]
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Tensor]:
        """Text, tokens of the prompt, ids generated. HTTP 400 as above."""
        _fit(model, inputs, gen_config)
        if gen_config.get_generation_mode() not in TOGETHER:
            return await super().generate_non_streaming(
                model, processor, inputs, gen_config, request_id
            )
        found: list[Tensor] = []
        done: Future[None] = Future()

        def put(token: Tensor) -> None:
            if done.cancelled():
                raise _GenerationCancelled
            found.append(token)

        def end(error: Exception | None) -> None:
            if done.set_running_or_notify_cancel():
                done.set_result(None) if error is None else done.set_exception(error)

        ids_T = inputs["input_ids"][0]
        self.ask(Request(model, ids_T, gen_config, put, end), processor)
        await asyncio.wrap_future(done)
        ids = torch.cat(found)
        return processor.decode(ids, skip_special_tokens=True), len(ids_T), ids

    def ask(self, request: Request, tokenizer: Any) -> None:
        """Puts a request behind those that wait."""
        with self.lock:
            self.waiting.append(request)
        self.submit(self.answer, tokenizer)

    def answer(self, tokenizer: Any) -> None:
        """Generates for the request that has waited longest, and others of its kind."""
        with self.lock:
            if not self.waiting:  # an earlier batch had it
                return
            alike = [each for each in self.waiting if each.kind == self.waiting[0].kind]
            batch = alike[: self.most]
            self.waiting = deque(each for each in self.waiting if each not in batch)
        ends, failed = Ends(batch), None
        try:
            _generate(batch, tokenizer, ends)
        except Exception as error:
            failed = error
        for request in ends.open:
            if request is not None:
                request.end(failed)


def _generate(batch: list[Request], tokenizer: Any, ends: Ends) -> None:
    """Prompts padded on the left, each beside its packs."""
    model, config = batch[0].model.model, copy.deepcopy(batch[0].config)
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    eos = config.eos_token_id
    eos = model.generation_config.eos_token_id if eos is None else eos
    ends.look_for(eos, config.stop_strings, tokenizer)
    config.stop_strings = None
    config.max_new_tokens = max(each.config.max_new_tokens for each in batch)
    config.pad_token_id = pad
    ids_BT = torch.nn.utils.rnn.pad_sequence(
        [each.ids_T for each in batch], True, pad, padding_side="left"
    )
    lengths_B = torch.tensor([[len(each.ids_T)] for each in batch], device=ids_BT.device)
    places_T = torch.arange(ids_BT.shape[1], 0, -1, device=ids_BT.device)
    packs = [each.model.packs for each in batch]
    model.generate(
        ids_BT,
        attention_mask=(places_T <= lengths_B).long(),
        generation_config=config,
        stopping_criteria=[ends],
        **({"packs": packs} if any(packs) else {}),
    )


def _fit(model: Any, inputs: Any, gen_config: Any) -> None:
    """Refuses what cannot be generated, and ends texts where the model's context does."""
    limit, tokens = model.config.max_position_embeddings, inputs["input_ids"].shape[-1]
    if not 0 < tokens < limit:
        raise HTTPException(400, f"prompt of {tokens} tokens: 1 to {limit - 1} fit the model")
    most = gen_config.max_new_tokens
    gen_config.max_new_tokens = limit - tokens if most is None else min(most, limit - tokens)
    stop = gen_config.stop_strings
    texts = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise HTTPException(400, f"stop={stop!r}: a text or a list of texts, none of them empty")
    gen_config.stop_strings = texts or None
