"""The residual stream of any decoder as an analysis reads it: after each block, around each memory.

Shapes: B sequences, T tokens, S streams, D width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.fuse import Fuse, Fused
from engram_lm.model.small_copy import decoder_layers


class Residual:
    """Hidden states of the last forward pass, and how the model makes logits of the last of them.

    Filled while `watched` runs; (B, T, D), or (B, T, S, D) where the model has S > 1 streams.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks: dict[int, Tensor] = {}
        """Layer -> what its block gave."""
        self.before: dict[int, Tensor] = {}
        """Layer with memory -> what the memory read."""
        self.after: dict[int, Tensor] = {}
        """Layer with memory -> the same with the update."""
        self.readers: list[nn.Module] = []
        """What follows the last block, up to the head: streams' merging, the final norm."""

    def read(self, hidden: Tensor, *, norm: bool = True) -> Tensor:
        """(B, T, D): merged and normalised as the last block's states are; norm=False: not
        normalised."""
        for reader in self.readers if norm else self.readers[:-1]:
            hidden = reader(hidden)
        return hidden

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, V) of what `read` gave."""
        logits_BTV: Tensor = self.model.get_output_embeddings()(hidden_BTD)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)

    def check(self, logits_BTV: Tensor) -> None:
        """ConfigError unless the last block, read so, gives the model's own logits of this pass;
        DataError where these are not numbers."""
        if not torch.isfinite(logits_BTV).all():
            raise DataError(f"{type(self.model).__name__}: some logits are not finite numbers")
        last = self.blocks[max(self.blocks)]
        if not torch.equal(self.logits(self.read(last)), logits_BTV):
            raise ConfigError(
                f"{type(self.model).__name__}: its logits are not its head's of its normalised "
                "last block, so earlier blocks cannot be read by it"
            )


@contextmanager
def watched(model: Any) -> Iterator[Residual]:
    """Inside, each forward pass of a causal LM fills the record; hooks come off at the end."""
    found = Residual(model)
    decoder = model.base_model
    layers = decoder_layers(decoder)

    def block(layer: int) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.blocks[layer] = output[0] if isinstance(output, tuple) else output
            found.readers.clear()

        return keep

    def memory(layer: int) -> Any:
        def keep(_module: nn.Module, inputs: tuple[Any, ...], fused: Fused) -> None:
            plain = getattr(model.config, "streams", 1) == 1
            before = inputs[0].squeeze(2) if plain else inputs[0]
            found.before[layer] = before
            found.after[layer] = before + (
                fused.update_BTSD.squeeze(2) if plain else fused.update_BTSD
            )

        return keep

    def reader(module: nn.Module, _inputs: Any, _output: Any) -> None:
        if found.blocks and module not in found.readers:  # `read` calls them once more
            found.readers.append(module)

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(block(index)).remove)
            fuse = getattr(layer, "engram", None)
            if isinstance(fuse, Fuse):
                stack.callback(fuse.register_forward_hook(memory(index)).remove)
        for module in decoder.children():
            if module is not layers and not isinstance(module, nn.ModuleDict):
                stack.callback(module.register_forward_hook(reader).remove)
        yield found
