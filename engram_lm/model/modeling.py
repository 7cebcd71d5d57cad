"""The model: DeepSeek-V3's attention and experts, mHC streams, and a memory, put together.

Shapes: B sequences, T tokens, S streams, D width.
Attention, experts, streams, caches and generation come from transformers. What is ours is where the
memory starts (`EngramLMModel.forward`) and where it is waited for (before its layer).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3PreTrainedModel,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
    DeepseekV3TopkRouter,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from engram_lm.model.call import Call
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.decoder import MemoryDecoder
from engram_lm.model.generation import EngramLMGenerationMixin
from engram_lm.model.identity import know_as_causal
from engram_lm.model.layer import EngramLMDecoderLayer
from engram_lm.model.pretrained import MemoryPreTrained


class EngramLMPreTrainedModel(MemoryPreTrained, DeepseekV3PreTrainedModel):
    """What both models share: capabilities, initial weights, the canonical map's file."""

    config: EngramLMConfig
    config_class = EngramLMConfig
    _no_split_modules = ["EngramLMDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = None
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": EngramLMDecoderLayer,
        "attentions": DeepseekV3Attention,
        "router_logits": OutputRecorder(DeepseekV3TopkRouter, index=0),
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers guesses from the source of this file, where the decorator is not

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekV4HyperConnection):
            init.normal_(module.fn, mean=0.0, std=std)
            init.zeros_(module.base)
            init.ones_(module.scale)
        elif isinstance(module, DeepseekV4HyperHead):
            init.normal_(module.hc_fn, mean=0.0, std=std)
            init.zeros_(module.hc_base)
            init.ones_(module.hc_scale)


class EngramLMModel(EngramLMPreTrainedModel, MemoryDecoder):
    """The decoder without its head."""

    def __init__(self, config: EngramLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            EngramLMDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = DeepseekV4HyperHead(config) if config.streams > 1 else None
        self.rotary_emb = DeepseekV3RotaryEmbedding(config)
        self.make_tables(config.memory_config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        engram_input_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        masked: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Arguments of every transformers decoder, and three of ours.

        engram_input_ids: (B, T) token ids to look up where inputs_embeds are given.
        padding_mask: (B, T), 0 at padding, for attention masks that are no longer 2-D.
        masked: bool (B, T), True at image tokens: their gate is 0 and look-back ends there.
        Documents packed into a row are told by position_ids that do not go on (or are 0): without a
        mask and with use_cache=False, or under a 4-D mask that keeps them apart; else AddressError.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        call = None
        if self.reads_memory:
            call = Call.of(
                input_ids if engram_input_ids is None else engram_input_ids,
                past_key_values,
                attention_mask=attention_mask,
                padding_mask=padding_mask,
                masked=masked,
                position_ids=position_ids,
            )
        reading = self.read(call, past_key_values)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device) + past
            position_ids = position_ids.unsqueeze(0)
        if isinstance(attention_mask, dict):  # generate builds one per layer type for static caches
            causal_mask = attention_mask["full_attention"]
        else:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        if self.hc_head is not None:
            streams = self.config.streams
            hidden_states = hidden_states.unsqueeze(2).expand(-1, -1, streams, -1).contiguous()
        # Assisted decoding with an early exit lowers the number for a while.
        for layer in self.layers[: self.config.num_hidden_layers]:
            vectors = None
            if reading is not None and layer.engram is not None:
                vectors = reading.pending.wait(layer.layer_idx)
            hidden_states = layer(
                hidden_states,
                vectors,
                reading,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        if reading is not None:
            reading.finish()
        if self.hc_head is not None:
            hidden_states = self.hc_head(hidden_states)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class EngramLMForCausalLM(EngramLMPreTrainedModel, EngramLMGenerationMixin):
    """The decoder with its LM head: loss, generate, save, load as in any transformers model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EngramLMConfig) -> None:
        super().__init__(config)
        self.model = EngramLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        engram_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As EngramLMModel.forward; labels: (B, T) token ids, -100 where no loss is wanted.

        The loss is the mean over labels, or their sum over `num_items_in_batch` where it is given.
        `generate` looks at these names to learn which inputs it may make and pass on.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            engram_input_ids=engram_input_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


know_as_causal(EngramLMForCausalLM)
