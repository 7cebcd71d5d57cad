"""Configurations of other families' models that were given a memory.

config.json says model_type "engram_attached", so that nobody opens the model without its memory;
the family's own type stands beside it. In memory `model_type` is the family's, because that is
what PEFT and transformers' weight conversion look at.
"""

import copy
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, DataError, MismatchError, shown
from engram_lm.model.config import (
    REMOTE_CODE,
    TABLE_DTYPES,
    WEIGHTS_OF_OURS,
    from_dict,
    memory_config,
    opens_ours,
)

PREFIX = "Engram"
"""Of the names of our classes: EngramLlamaForCausalLM is LlamaForCausalLM with a memory."""
MODEL_TYPE = "engram_attached"
BACKBONE = "backbone_model_type"
_OF_THE_FILE = ("model_type", BACKBONE, "auto_map", *WEIGHTS_OF_OURS)
_MODULE = REMOTE_CODE.removesuffix(".py")


_AS_BEFORE = {"dtype", "torch_dtype", "_name_or_path", "architectures", "use_cache"}
"""Fields that a model may be opened with others of, and computes as before."""
_OURS = ("memory", "table_dtype", "refused_modes")
"""What the family's configuration has not."""


class _WithMemory:
    """What stands before a family's own configuration class."""

    memory: dict[str, Any] | None
    table_dtype: str | None
    refused_modes: dict[str, str] | None
    """What `probe` gave; None where it has not been asked, or not with this transformers."""

    @property
    def memory_config(self) -> MemoryConfig | None:
        """`memory` as an object."""
        return None if self.memory is None else memory_config(self.memory)

    @property
    def auto_map(self) -> dict[str, str]:
        """For those who have not imported this package; TRL looks for it in the object too."""
        return {
            "AutoConfig": f"{_MODULE}.AttachedConfig",
            "AutoModelForCausalLM": f"{_MODULE}.AttachedForCausalLM",
        }

    @property
    def transformers_weights(self) -> str | None:
        """The name of no file, by which a family's own class refuses this configuration."""
        return None if opens_ours() else WEIGHTS_OF_OURS["transformers_weights"]

    @classmethod
    def get_config_dict(cls, path: Any, **kwargs: Any) -> Any:
        """What config.json holds, with the family's model_type, which transformers compares with
        the class's. MismatchError for another family's."""
        record, unused = super().get_config_dict(path, **kwargs)  # type: ignore[misc]
        if record.get("model_type") == MODEL_TYPE:
            check_saved(record)
            family = cls.model_type  # type: ignore[attr-defined]
            if record.get(BACKBONE) != family:
                raise MismatchError(
                    f"{path}: a {record.get(BACKBONE)!r} with memory, not a {family!r}"
                )
            record = {**record, "model_type": family}
        return record, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Of what config.json holds."""
        record = {k: v for k, v in config_dict.items() if k not in _OF_THE_FILE}
        modes = record.get("refused_modes")
        changed = (set(kwargs) - _AS_BEFORE) & set(record)
        if changed or record.get("transformers_version") != transformers.__version__:
            record["refused_modes"] = None  # of another model, or by other code
        elif modes is not None and not (
            isinstance(modes, dict) and all(isinstance(each, str) for each in modes.values())
        ):
            raise DataError(
                f"config.json: refused_modes={shown(modes)}: null, or an object of texts, is needed"
            )
        return from_dict(super().from_dict, record, kwargs)  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        record: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        family = record["model_type"]
        return record | {
            "model_type": MODEL_TYPE,
            BACKBONE: family,
            "auto_map": self.auto_map,
            **WEIGHTS_OF_OURS,
        }

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As everywhere in transformers; beside it the file that `auto_map` names."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)  # type: ignore[misc]
        shutil.copyfile(Path(__file__).with_name(REMOTE_CODE), Path(save_directory) / REMOTE_CODE)

    def check(self) -> None:
        """ConfigError where memory and family do not fit."""
        layers: int = self.num_hidden_layers  # type: ignore[attr-defined]
        if self.table_dtype not in tuple(TABLE_DTYPES):
            accepted = ", ".join(map(repr, TABLE_DTYPES))
            raise ConfigError(f"table_dtype={shown(self.table_dtype)}: accepted are {accepted}")
        memory = self.memory_config
        if memory is not None and memory.specification.layers[-1] >= layers:
            raise ConfigError(
                f"memory layers {memory.specification.layers}: the model has layers 0 to "
                f"{layers - 1} (zero-based)"
            )


def bare_config(config: Any) -> Any:
    """A copy of a model's configuration as it is without memory, of the family's own class."""
    config = copy.deepcopy(config)
    config.__class__ = type(config).__mro__[2]
    for name in _OURS:
        config.__dict__.pop(name, None)
    return config


def check_saved(record: dict[str, Any]) -> None:
    """DataError for the config.json of identity.UNSAVED, which stands for no saved model."""
    if "unsaved" in record:
        raise DataError(f"this model cannot be opened by its name: {record['unsaved']}")


@cache
def attached_config(family: type) -> Any:
    """The class of a family's configurations with memory, made once."""
    return type(
        PREFIX + family.__name__,
        (_WithMemory, family),
        {
            "__module__": "engram_lm.model.attached",
            "__doc__": f"{family.__name__} with a memory.",
            "__annotations__": {
                "memory": dict[str, Any] | None,
                "table_dtype": str | None,
                "refused_modes": dict[str, str] | None,
            },
            **dict.fromkeys(_OURS),
        },
    )
