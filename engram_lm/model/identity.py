"""Whose a model is: what it says that it comes from, and whose code transformers takes it for."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

UNSAVED = str(Path(__file__).with_name("unsaved"))
"""Where a configuration says that it comes from while no directory holds the model: a directory
whose config.json makes opening it a DataError. Trainer and TRL leave directories out of cards."""


NO_NAME = "a model changed and not saved since: call its save_pretrained(DIR) and open DIR"
"""What PEFT records as the model that its adapter belongs to, and AutoPeft then fails to open, in
these words: neither the name of a directory nor one that a hub is asked for."""


class FamilyCode:
    """Comes before a family's class, `family`, and gives ours what transformers decides not by
    inheritance but by the module or the name of the class itself."""

    family: Any
    """The class without memory."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """No more than the family is: else buffers stay uninitialised and experts unconverted."""
        return bool(cls.family.is_custom_code())

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return bool(cls.family._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls.family._can_set_experts_implementation())


def convert_as(kind: Any, family: Any) -> None:
    """Weights of `kind` are named and put together in files as those of `family` are."""
    mapping = get_checkpoint_conversion_mapping(family.__name__)
    if mapping is not None:
        register_checkpoint_conversion_mapping(kind.__name__, mapping, overwrite=True)


def know_as_causal(kind: Any) -> None:
    """Trainer's label smoothing and pipelines know causal models by this table of names."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind.__name__] = kind.__name__


def record_outputs(model: PreTrainedModel) -> None:
    """After a change of class: hidden states and attentions are recorded by the class's name."""
    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs


def name_after(model: nn.Module, config: Any, origin: str | None = None) -> None:
    """Says where model and configuration come from; None: from nowhere, since they were changed.

    Otherwise PEFT and TRL would open the model as it was before, without a word. TRL asks the
    configuration. PEFT asks the model, and as it saves it would open a directory so named.
    """
    config.name_or_path = UNSAVED if origin is None else origin
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.name_or_path = NO_NAME if origin is None else origin
