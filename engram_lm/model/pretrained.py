"""A transformers model with a memory, as it is saved and opened: whole, or not at all."""

import os
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from engram_lm.errors import ConfigError, DataError, MismatchError, instance, whole_number
from engram_lm.memory import untaken
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.fuse import Fuse, ShortConv
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.served import ServedTables
from engram_lm.memory.table import Table
from engram_lm.model import directory, serve
from engram_lm.model.adapters import adapters_aside, has_adapter
from engram_lm.model.config import opened_by_us
from engram_lm.model.identity import NO_NAME, UNSAVED
from engram_lm.store.weights import check_as_transformers_reads

NEVER_QUANTISED = "engram.kv"
"""A Linear that quantisers of a backbone, who know no other, would take for one of its own."""


class MemoryPreTrained(PreTrainedModel):
    """Of a decoder with memory and of what stands around it. Comes before a family's own class."""

    def __init__(self, config: Any) -> None:
        instance("config", config, type(self).config_class)
        super().__init__(config)
        if self.name_or_path == UNSAVED:
            self.name_or_path = NO_NAME
        self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ()), NEVER_QUANTISED}
        if not serve.makes_tables():
            ignored = set(self._keys_to_ignore_on_load_unexpected or ())
            self._keys_to_ignore_on_load_unexpected = ignored | {r"(^|\.)tables\."}

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, Any]:
        """The same list again, which at float16 would mean float32 too."""
        plan: dict[str, Any] = super()._get_dtype_plan(dtype)
        plan.pop(NEVER_QUANTISED, None)
        return plan

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: opened once with trust_remote_code, our classes would from then on be taken for
        code of the hub, copied beside every saved model and left with uninitialised buffers."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Table):
            init.normal_(
                module.weight, mean=0.0, std=getattr(self.config, "initializer_range", 0.02)
            )
        elif isinstance(module, Fuse):
            init.constant_(module.query_norm_weight, 1.0 - module.norm_offset)
            init.constant_(module.key_norm_weight, 1.0 - module.norm_offset)
        elif isinstance(module, ShortConv):
            init.constant_(module.norm_weight, 1.0 - module.norm_offset)
            init.zeros_(module.weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients, those of rows too."""
        super().zero_grad(set_to_none)
        for module in self.modules():
            if isinstance(module, Table):
                untaken.cleared(module)
                module.row_gradient = None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """As everywhere in transformers; beside the weights all that the model needs to be whole.

        Specification, canonical map, model card (one of your own is kept) and checksums; of a
        model with an adapter (`add_adapter`) the adapter too. ConfigError where less than the
        whole would be written: for a `state_dict` without all weights.
        """
        if not self.should_save_on_this_rank(is_main_process):
            return super().save_pretrained(save_directory, is_main_process, **kwargs)
        directory.begin(self, Path(save_directory), kwargs)
        if has_adapter(self):
            with adapters_aside(self):
                super().save_pretrained(save_directory, is_main_process, **kwargs)
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
        home = Path(path, kwargs.get("subfolder") or "")
        if home.is_dir() and kwargs.get("variant") is None:
            check_as_transformers_reads(home)
        elsewhere = nullcontext() if budget is None else serve.rows_in_files()
        try:
            # Sizes are compared below, where the error can say which and how.
            with elsewhere, opened_by_us():
                loaded: Any = super().from_pretrained(
                    path, *inputs, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
                )
        except SafetensorError as error:
            raise DataError(f"{path}: the weights cannot be read ({error})") from error
        model, info = loaded
        directory.check_loaded(model, path, info, ignore_mismatched_sizes)
        if canonical is not None:
            model.set_canonical_map(canonical)
        if budget is not None:
            model.serve_rows(serve.open_rows(model.config.memory_config, path, tables, budget))
        return (model, info) if output_loading_info else model

    def serve_rows(self, served: ServedTables) -> None:
        """Takes rows from these stores instead of tables, and closes them when it is collected."""
        decoder: Any = self.base_model
        decoder.served = served
        weakref.finalize(decoder, served.close)

    def set_canonical_map(self, canonical: CanonicalMap) -> None:
        """Gives a model with memory its tokenizer's map. MismatchError if it has another.

        Ids that the model has beyond the map of its memory (a padded embedding, tokens that were
        added later) are classes of their own, whatever a grown tokenizer makes of them.
        """
        instance("canonical", canonical, CanonicalMap)
        memory = self.config.memory_config
        if memory is None:
            raise ConfigError("memory=None: a model without memory has no canonical map")
        ids, size = canonical.own.token_ids, self.config.vocab_size
        if ids > size:
            raise MismatchError(
                f"the canonical map has {ids} ids, vocab_size is {size}; "
                f"resize_token_embeddings({ids}) gives the model more"
            )
        canonical = memory.specification.model_map(canonical, size)
        addresses = Addresses(memory.specification, canonical)
        decoder: Any = self.base_model
        decoder.seal.set(addresses.specification.digest)
        self.config.memory = replace(memory, specification=addresses.specification).to_dict()
        decoder.addresses = addresses

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *arguments: Any,
        **kwargs: Any,
    ) -> nn.Embedding:
        """As everywhere in transformers. New ids are classes of their own to the memory, and rows
        of the others stay; ConfigError, and nothing has changed, where ids of its map would go.
        """
        decoder: Any = self.base_model
        if new_num_tokens is not None:
            new_num_tokens = whole_number("new_num_tokens", new_num_tokens, least=1)
            if pad_to_multiple_of is not None:
                whole_number("pad_to_multiple_of", pad_to_multiple_of, least=1)
            multiple = pad_to_multiple_of or 1
            size = -(-new_num_tokens // multiple) * multiple
            for name, holder in decoder.memories().items():
                known = holder.addresses.canonical.own.token_ids
                if size < known:
                    raise ConfigError(
                        f"resize_token_embeddings({new_num_tokens}): {name} is addressed by "
                        f"{known} token ids, and none of them may go"
                    )
        embedding = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, *arguments, **kwargs
        )
        for holder in decoder.memories().values():
            holder.addresses = holder.addresses.grown(self.config.vocab_size)
        return embedding
