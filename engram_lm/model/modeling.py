"""The model: DeepSeek-V3's attention and experts, mHC streams, and a memory, put together.

Shapes: B sequences, T tokens, S streams, D width.
Attention, experts, streams, caches and generation come from transformers. What is ours is where the
memory starts (`EngramLMModel.forward`) and where it is waited for (before its layer).
"""

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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

from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.fuse import Fuse, ShortConv
from engram_lm.memory.lookup import Memory
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.served import ServedTables
from engram_lm.memory.table import Table
from engram_lm.model import directory, serve
from engram_lm.model.cache import decoding_state, forget_state
from engram_lm.model.config import TABLE_DTYPES, EngramLMConfig
from engram_lm.model.documents import document_starts
from engram_lm.model.generation import EngramLMGenerationMixin
from engram_lm.model.layer import EngramLMDecoderLayer, Reading
from engram_lm.model.seal import Seal


class EngramLMPreTrainedModel(DeepseekV3PreTrainedModel):
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

    def __init__(self, config: EngramLMConfig) -> None:
        super().__init__(config)
        if not serve.makes_tables():
            self._keys_to_ignore_on_load_unexpected = {r"(^|\.)tables\."}

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
        elif isinstance(module, Table):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, Fuse):
            init.constant_(module.query_norm_weight, 1.0 - module.norm_offset)
            init.constant_(module.key_norm_weight, 1.0 - module.norm_offset)
        elif isinstance(module, ShortConv):
            init.constant_(module.norm_weight, 1.0 - module.norm_offset)
            init.zeros_(module.weight)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """As everywhere in transformers; beside the weights all that the model needs to be whole.

        Specification, canonical map, model card (one of your own is kept) and checksums.
        """
        if not self.should_save_on_this_rank(is_main_process):
            return super().save_pretrained(save_directory, is_main_process, **kwargs)
        directory.begin(self, Path(save_directory))
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if not kwargs.get("push_to_hub"):
            directory.finish(self, Path(save_directory))

    def _upload_modified_files(self, working_dir: str, *arguments: Any, **kwargs: Any) -> Any:
        directory.finish_upload(self, Path(working_dir))
        return super()._upload_modified_files(working_dir, *arguments, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        path: Any,
        *inputs: Any,
        tokenizer: Any = None,
        memory: str | None = None,
        memory_budget: int | str | None = None,
        tables: str | os.PathLike[str] | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As everywhere in transformers, but config, specification, canonical map, weights and
        tokenizer must be of one model, or it raises MismatchError.

        A tokenizer.json beside the weights is always checked, `tokenizer` as well where it is
        given. DataError if the canonical map or the weights cannot be read.
        memory="disk": rows stay in the weights' files, or in the packed files of the directory
        `tables`, and are read when they are asked for; of memory they take `memory_budget` (bytes,
        or "2GB"). The model can then not be trained or saved.
        """
        budget = serve.budget_of(memory, memory_budget, tables)
        canonical = directory.canonical_map(path, tokenizer, kwargs)
        if budget is not None and canonical is None:
            raise ConfigError(f"{path}: memory='disk', and the model has no memory")
        elsewhere = nullcontext() if budget is None else serve.rows_in_files()
        try:
            # Sizes are compared below, where the error can say which and how.
            with elsewhere:
                loaded: Any = super().from_pretrained(
                    path, *inputs, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
                )
        except SafetensorError as error:
            raise DataError(f"{path}: the weights cannot be read ({error})") from error
        model, info = loaded
        directory.check_loaded(path, info, ignore_mismatched_sizes)
        if canonical is not None:
            model.set_canonical_map(canonical)
        if budget is not None:
            model.serve_rows(serve.open_rows(model.config.memory_config, path, tables, budget))
        return (model, info) if output_loading_info else model

    def serve_rows(self, served: ServedTables) -> None:
        """Takes rows from these stores instead of tables, and closes them when it is collected."""
        self.base_model.served = served
        weakref.finalize(self.base_model, served.close)

    def set_canonical_map(self, canonical: CanonicalMap) -> None:
        """Gives a model with memory its tokenizer's map. MismatchError if it has another."""
        memory = self.config.memory_config
        if memory is None:
            raise ConfigError("memory=None: a model without memory has no canonical map")
        if canonical.token_ids > self.config.vocab_size:
            raise MismatchError(
                f"the canonical map has {canonical.token_ids} ids, vocab_size is "
                f"{self.config.vocab_size}"
            )
        addresses = Addresses(memory.specification, canonical)
        self.base_model.seal.set(addresses.specification.digest)
        self.config.memory = replace(memory, specification=addresses.specification).to_dict()
        self.base_model.addresses = addresses


class EngramLMModel(EngramLMPreTrainedModel):
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
        self.addresses: Addresses | None = None
        self.tables = nn.ModuleDict()
        self.served: ServedTables | None = None
        """Instead of tables, where rows stay in files."""
        self.keep = 0
        memory = config.memory_config
        if memory is not None:
            self.seal = Seal()
            for layer in memory.specification.layers if serve.makes_tables() else ():
                rows = memory.specification.table_rows(layer)
                dtype = TABLE_DTYPES[config.table_dtype]
                self.tables[str(layer)] = Table(rows, memory.head_dim, dtype=dtype)
            convs = [module for module in self.modules() if isinstance(module, ShortConv)]
            self.keep = max([memory.specification.lookback, *(conv.reach for conv in convs)])
        self._without_memory = False
        self._serving = False
        self.gradient_checkpointing = False
        self.post_init()

    @contextmanager
    def without_memory(self) -> Iterator[None]:
        """Inside, no row is read and nothing is added: the backbone alone, weights untouched."""
        self._without_memory = True
        try:
            yield
        finally:
            self._without_memory = False

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, no row is read either, but memory adds what it makes of zeros, and rows of tables
        that workers share are there for the others: the part of one that has no tokens."""
        self._serving = True
        try:
            yield
        finally:
            self._serving = False

    @property
    def reads_memory(self) -> bool:
        """False for a model without memory, and inside `without_memory`."""
        return self.config.memory is not None and not self._without_memory

    @property
    def memory(self) -> Memory:
        """Addresses and tables. ConfigError where the canonical map is still missing."""
        if self.addresses is None:
            raise ConfigError(
                "no canonical map: call set_canonical_map(CanonicalMap.from_tokenizer(t))"
            )
        if self.served is not None:
            return Memory(self.addresses, self.served.layers)
        return Memory(self.addresses, {int(layer): table for layer, table in self.tables.items()})

    def look_ahead(self, prompts: Iterable[Sequence[int]]) -> None:
        """Begins to read the rows of texts that wait for their turn, first things first.

        prompts: token ids of each text from its start. What is beyond the part of the memory
        budget that pages on their way may take is read when it is asked for. Does nothing where
        rows are in memory.
        """
        for prompt in prompts:
            self.memory.look_ahead(torch.as_tensor(prompt)[None])

    def expect(self, token_ids_BT: Tensor) -> None:
        """Asks for the rows of the last position, before the forward pass on it does.

        token_ids_BT: the texts so far, their last few tokens at least. A wrong guess costs reading.
        """
        if self.served is None or not self.reads_memory:
            return
        addresses = self.memory.addresses
        history_BH = token_ids_BT[:, :-1][:, -addresses.specification.lookback :]
        rows_LBTH = addresses.rows(token_ids_BT[:, -1:], history_BH)
        for served, rows_BTH in zip(self.served.layers.values(), rows_LBTH, strict=True):
            served.expect(rows_BTH.reshape(-1))

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
        reading = None
        if self.reads_memory:
            ids = input_ids if engram_input_ids is None else engram_input_ids
            if ids is None:
                raise ValueError(
                    "inputs_embeds without engram_input_ids: memory is addressed by ids"
                )
            flat = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
            if padding_mask is None and flat:
                padding_mask = attention_mask[:, -ids.shape[1] :]
            padding = None if padding_mask is None else ~padding_mask.bool()
            starts = None
            if position_ids is not None:
                starts = document_starts(position_ids, padding, attention_mask, past_key_values)
                starts = starts.expand_as(ids)
            reading = self._start(ids, padding, masked, starts, past_key_values)
        elif past_key_values is not None:
            forget_state(past_key_values, self.config.num_hidden_layers)

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
        if reading is not None and reading.state is not None:
            reading.state.commit(reading.window, reading.tails)
        if self.hc_head is not None:
            hidden_states = self.hc_head(hidden_states)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def _start(
        self,
        token_ids: Tensor,
        padding: Tensor | None,
        masked: Tensor | None,
        starts: Tensor | None,
        cache: Cache | None,
    ) -> Reading:
        """Starts early: the rows of all layers are on their way before the first block runs."""
        memory, state = self.memory, None
        if cache is not None:
            state = decoding_state(cache, self.config.num_hidden_layers, self.keep)
        lookback = self.keep if state is None else 0
        window = memory.addresses.open(token_ids, None, padding, masked, starts, lookback=lookback)
        if state is not None:
            window = state.open(window)
        pending = memory.serve(window) if self._serving else memory.start_window(window)
        return Reading(pending, _kept(padding, masked), state)


def _kept(padding: Tensor | None, masked: Tensor | None) -> Tensor | None:
    if padding is None:
        return None if masked is None else ~masked
    return ~padding if masked is None else ~(padding | masked)


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
