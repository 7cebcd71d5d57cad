"""Which specification a set of weights was trained with, recorded among the weights themselves.

Another seed or rule leaves every shape as it is and makes every row that is read a wrong one. Files
beside the weights can be exchanged; 32 bytes in the state dict go wherever the weights go.
"""

from typing import Any

import torch
from torch import Tensor, nn

from engram_lm.errors import MismatchError
from engram_lm.memory.offload import held


class Seal(nn.Module):
    """The specification's hash as a buffer `sha256`: uint8 (32,), all zero until it is known."""

    sha256: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sha256", torch.zeros(32, dtype=torch.uint8))

    @property
    def digest(self) -> str | None:
        """In hex; None where nothing is recorded yet, or can be (the meta device)."""
        sha256 = held(self, "sha256")
        return None if sha256.is_meta else digest(sha256)

    def set(self, wanted: str) -> None:
        """Records this hash. MismatchError if the weights have another one."""
        _compare(self.digest, wanted)
        self.sha256.copy_(torch.frombuffer(bytearray.fromhex(wanted), dtype=torch.uint8))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any, **named: Any
    ) -> None:
        saved = state_dict.get(f"{prefix}sha256")
        if saved is not None and self.digest is not None:
            _compare(digest(saved), self.digest)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **named)


def digest(sha256: Tensor) -> str | None:
    """Of a seal's 32 bytes, in hex; None if they are zero."""
    text = bytes(sha256.tolist()).hex()
    return text if text.strip("0") else None


def _compare(saved: str | None, wanted: str) -> None:
    if saved not in (None, wanted):
        raise MismatchError(
            f"the weights were trained with the specification of sha256 {saved}, this model has "
            f"sha256 {wanted}"
        )
