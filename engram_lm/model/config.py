"""The configuration of a model: DeepSeek-V3's fields, streams, and a memory."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import DeepseekV3Config

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, shown

TABLE_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}
"""What EngramLMConfig.table_dtype may be."""
REMOTE_CODE = "modeling_engram_lm.py"
"""A file beside every saved model that leads transformers to this package."""
WEIGHTS_OF_OURS = {
    "transformers_weights": "a model of engram_lm, which may have a memory: import engram_lm and "
    "open it with AutoModelForCausalLM"
}
"""In every config.json. Another family's class takes it for the name of the weights' file, and its
from_pretrained raises an error that shows it, instead of opening the model without its memory."""

_OPENED_BY_US: ContextVar[bool] = ContextVar("a model is opened by our own class", default=False)


@contextmanager
def opened_by_us() -> Iterator[None]:
    """Inside, configurations with memory name no file of weights that is none."""
    token = _OPENED_BY_US.set(True)
    try:
        yield
    finally:
        _OPENED_BY_US.reset(token)


def opens_ours() -> bool:
    """True inside `opened_by_us`."""
    return _OPENED_BY_US.get()


@strict
class EngramLMConfig(DeepseekV3Config):
    """DeepseekV3Config (MLA, DeepSeekMoE, YaRN) with what it lacks. Raises ConfigError.

    Each layer's FFN is dense (`intermediate_size`) or mixture of experts; `streams` residual
    streams are mixed by mHC (DeepSeek-V4), 1 is the plain residual. Defaults are those of a small
    model.
    """

    model_type = "engram_lm"
    attribute_map = {
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
        "hc_mult": "streams",
    }

    vocab_size: int = 8192
    hidden_size: int = 128
    intermediate_size: int = 512
    moe_intermediate_size: int = 64
    shared_intermediate_size: int = 64
    """Width of all shared experts together."""
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    n_routed_experts: int = 32
    num_experts_per_tok: int | None = 2
    n_group: int | None = 1
    topk_group: int | None = 1
    routed_scaling_factor: float = 1.0
    mlp_layer_types: list[str] | None = None
    """"dense" or "sparse" for each layer; all sparse where nothing is said."""
    kv_lora_rank: int = 64
    q_lora_rank: int | None = None
    qk_rope_head_dim: int = 16
    qk_nope_head_dim: int = 16
    v_head_dim: int | None = 32
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 1
    tie_word_embeddings: bool = True
    streams: int = 1
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    memory: dict[str, Any] | None = None
    """MemoryConfig.to_dict() with a bound specification, or None: no memory."""
    table_dtype: str | None = None
    """"fp32" or "bf16", whatever the rest is loaded as; None: as the rest."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse"] * self.num_hidden_layers
        # One shared expert as wide as all of them: the same sum, and its width is free to choose.
        self.n_shared_experts = 1
        super().__post_init__(**kwargs)
        self.check()

    @property
    def memory_config(self) -> MemoryConfig | None:
        """`memory` as an object."""
        return None if self.memory is None else memory_config(self.memory)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As everywhere in transformers; beside it the file that `auto_map` names."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        shutil.copyfile(Path(__file__).with_name(REMOTE_CODE), Path(save_directory) / REMOTE_CODE)

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds; `auto_map` is for those who have not imported this package."""
        module = REMOTE_CODE.removesuffix(".py")
        auto_map = {
            "AutoConfig": f"{module}.EngramLMConfig",
            "AutoModel": f"{module}.EngramLMModel",
            "AutoModelForCausalLM": f"{module}.EngramLMForCausalLM",
        }
        return {**super().to_diff_dict(), "auto_map": auto_map, **WEIGHTS_OF_OURS}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Of what config.json holds."""
        record = {k: v for k, v in config_dict.items() if k not in WEIGHTS_OF_OURS}
        return from_dict(super().from_dict, record, kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would from now on copy this module beside every saved model."""

    def check(self) -> None:
        """ConfigError where fields do not fit one another."""
        if len(self.mlp_layer_types or []) != self.num_hidden_layers:
            raise ConfigError(
                f"mlp_layer_types={self.mlp_layer_types}: one entry for each of "
                f"{self.num_hidden_layers} layers is needed"
            )
        wrong = set(self.mlp_layer_types or []) - {"dense", "sparse"}
        if wrong:
            raise ConfigError(
                f"mlp_layer_types: {sorted(wrong)[0]!r}; accepted are dense and sparse"
            )
        if self.streams < 1:
            raise ConfigError(f"streams={self.streams}: 1 (plain residual) or more")
        if self.table_dtype not in tuple(TABLE_DTYPES):
            accepted = ", ".join(map(repr, TABLE_DTYPES))
            raise ConfigError(f"table_dtype={shown(self.table_dtype)}: accepted are {accepted}")
        memory = self.memory_config
        if memory is not None and memory.specification.layers[-1] >= self.num_hidden_layers:
            raise ConfigError(
                f"memory layers {memory.specification.layers}: the model has layers 0 to "
                f"{self.num_hidden_layers - 1} (zero-based)"
            )


def _in_one_line(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def checked(self: EngramLMConfig, *args: Any, **fields: Any) -> None:
        try:
            init(self, *args, **fields)
        except StrictDataclassError as error:
            raise ConfigError(f"model: {' '.join(str(error).split())}") from error

    return checked


EngramLMConfig.__init__ = _in_one_line(EngramLMConfig.__init__)  # type: ignore[method-assign]


def from_dict(
    read: Callable[..., Any], config_dict: dict[str, Any], options: dict[str, Any]
) -> Any:
    """What `read` makes of them. The Auto classes give a configuration all that they are called
    with: memory="disk" says where rows are, and is left for the model."""
    place = {"memory": options.pop("memory")} if isinstance(options.get("memory"), str) else {}
    found = read(config_dict, **options)
    if not options.get("return_unused_kwargs"):
        return found
    config, unused = found
    return config, unused | place


def memory_config(record: dict[str, Any]) -> MemoryConfig:
    """A configuration's `memory` as an object, made once for the same values."""
    return _memory_config(json.dumps(record))


@lru_cache(maxsize=8)
def _memory_config(text: str) -> MemoryConfig:
    # Kept outside the instance: transformers writes everything in its __dict__ to config.json.
    return MemoryConfig.from_dict(json.loads(text))
