"""What `generate` must know of a memory: the state in the cache, masks, and what it cannot do."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList

from engram_lm.errors import ConfigError


class _RowsNext(StoppingCriteria):
    """Stops nothing. It is what `generate` calls first with a token that it has just sampled."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.decoder.expect(input_ids)
        return input_ids.new_zeros(len(input_ids), dtype=torch.bool)


class EngramLMGenerationMixin(GenerationMixin):
    """transformers' generation for a decoder whose memory has a state of its own."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused with a memory: paged attention packs sequences that our state cannot follow."""
        if self.config.memory is not None or getattr(self.base_model, "packs", None):
            raise ConfigError(
                "generate_batch and cache_implementation='paged' (continuous batching): a model "
                "with memory cannot page its state; use generate()"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> Any:
        """Puts our state into the cache before anybody asks the cache to record its past."""
        if generation_config.speculation_type == "dflash":
            raise ConfigError(
                "speculation_type='dflash': made for the models it drafts for; use assistant_model"
            )
        prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        if self.base_model.reads_memory and cache is not None:
            self.base_model.state_of(cache).recording |= bool(generation_config.is_assistant)
        return prepared

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Beside the usual: of rows on disk, the next token's are asked for when it is sampled."""
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        one = (generation_config.num_beams or 1) == 1 and not generation_config.is_assistant
        if self.base_model.served is not None and one:
            criteria = StoppingCriteriaList([_RowsNext(self.base_model), *criteria])
        return criteria

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        engram_input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Keeps the 2-D mask beside the 4-D one that a static cache is given, and the ids to look
        up beside the embeddings of a prompt.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        embeds = inputs.get("inputs_embeds")
        tokens = inputs["input_ids"].shape[1] if embeds is None else embeds.shape[1]
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            inputs["padding_mask"] = attention_mask[:, -tokens:]
        if embeds is not None and engram_input_ids is not None:
            inputs["engram_input_ids"] = engram_input_ids[:, -tokens:]
        return inputs
