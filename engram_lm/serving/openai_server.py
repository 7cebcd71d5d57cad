"""transformers' OpenAI-compatible server, taught our models: which are served, and with what packs.

Its own model manager finds an architecture by name inside transformers, where ours are not. Its
continuous batching pages attention, and a memory's state cannot follow there: requests that wait
are generated together instead, as rows of one batch.
"""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState, Modality

from engram_lm.serving.batched_requests import InBatches, WithPacks

SEPARATOR, STACKED = "/", "+"
"""Of model names: NAME/law reads the pack `law`, NAME/law+code both."""


class OneModel(ModelManager):
    """One open model under its name, and under one name for each choice of packs.

    model: one of ours, attached with packs loaded, or any other.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(model_timeout=-1)
        self.name, self.model, self.tokenizer = name, model, tokenizer

    @property
    def names(self) -> list[str]:
        """Alone, and with each pack; packs may be stacked too."""
        packs = getattr(self.model.base_model, "packs", {})
        return [self.name, *(f"{self.name}{SEPARATOR}{pack}" for pack in packs)]

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """As it is: there are no revisions."""
        return model_id

    def load_model_and_processor(
        self, model_id_and_revision: str, *_arguments: Any, **_options: Any
    ) -> tuple[Any, Any]:
        """The model with the packs of this name, and its tokenizer. HTTP 404 for another name."""
        _, _, stacked = model_id_and_revision.removeprefix(self.name).partition(SEPARATOR)
        packs = tuple(stacked.split(STACKED)) if stacked else ()
        known = [f"{self.name}{SEPARATOR}{pack}" in self.names for pack in packs]
        plain = SEPARATOR.join([self.name, stacked] if stacked else [self.name])
        if plain != model_id_and_revision or not all(known):
            served = ", ".join(self.names)
            raise HTTPException(404, f"model {model_id_and_revision!r}: served are {served}")
        return WithPacks(self.model, packs), self.tokenizer

    async def load_model_streaming(
        self, model_id_and_revision: str, gguf_file: str | None = None
    ) -> AsyncIterator[str]:
        """Nothing to load."""
        yield 'data: {"status": "ready", "cached": true}\n\n'

    def get_model_modality(  # type: ignore[override]
        self, *_arguments: Any, **_options: Any
    ) -> Modality:
        """Text."""
        return Modality.LLM

    def get_gen_models(  # type: ignore[override]
        self, cache_dir: str | None = None
    ) -> list[dict[str, Any]]:
        """What GET /v1/models lists."""
        return [{"id": name, "object": "model", "owned_by": "engram-lm"} for name in self.names]

    def shutdown(self) -> None:
        """The process owns the model."""


class OneManager(GenerationState):
    """The same one for all names of the model."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._manager = InBatches(most)

    def get_manager(self, model_id: str, use_cb: bool = False) -> InBatches:
        """Of every name."""
        return self._manager


class Chat(ChatCompletionHandler):
    """Chat needs a template, which a base model's tokenizer has not."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """HTTP 400 without a template."""
        manager: Any = self.model_manager
        if manager.tokenizer.chat_template is None:
            raise HTTPException(400, "the tokenizer has no chat template: use /v1/completions")
        return await super().handle_request(body, request_id)


def server(models: OneModel, most: int) -> FastAPI:
    """The application: completions, chat, responses and models under /v1, and /health.

    most: requests that are generated together.
    """
    state = OneManager(most)
    application = build_server(
        models,
        Chat(models, state),
        completion_handler=CompletionHandler(models, state),
        response_handler=ResponseHandler(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
    )
    application.add_exception_handler(HTTPException, _refusal)
    return application


async def _refusal(_request: Any, error: Any) -> JSONResponse:
    """As OpenAI's clients look for it."""
    message = {"message": error.detail, "type": "invalid_request_error", "code": error.status_code}
    return JSONResponse({"error": message}, status_code=error.status_code)
