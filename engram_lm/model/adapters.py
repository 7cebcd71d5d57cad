"""A model with an adapter of transformers' own (`add_adapter`), saved with what it stands on.

save_pretrained of transformers writes such an adapter alone, and leaves a memory trained beside it
behind. From a directory with a whole model and an adapter it opens both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from engram_lm.errors import ConfigError


def has_adapter(model: Any) -> bool:
    """Whether an adapter was given to the model itself: `add_adapter` or `load_adapter`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapters_aside(model: Any) -> Iterator[None]:
    """Inside, the model is the one without adapters, weights and names.

    ConfigError where an adapter's values were added to the weights (`merge`).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    taken: list[tuple[nn.Module, str, Any, nn.Module]] = []
    for parent in list(model.modules()):
        for name, each in parent.named_children():
            part: Any = each
            if isinstance(part, BaseTunerLayer):
                if part.merged:
                    raise ConfigError("an adapter is merged into the weights: unmerge it to save")
                taken.append((parent, name, part, part.get_base_layer()))
            elif isinstance(part, AuxiliaryTrainingWrapper):
                taken.append((parent, name, part, part.original_module))
    try:
        for parent, name, _, plain in taken:
            parent._modules[name] = plain
        model._hf_peft_config_loaded = False
        yield
    finally:
        for parent, name, part, _ in taken:
            parent._modules[name] = part
        model._hf_peft_config_loaded = True
