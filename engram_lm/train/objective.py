"""What is minimised: the next-token loss, as one module from token ids to a number.

A module, because that is what DDP and fully_shard wrap: the head's matrix is used inside `forward`,
where a sharded backbone has it whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.train.batches import Batch


class Objective(nn.Module):
    """Mean loss of a batch in nats a token; 0, with a gradient of 0, where it has no tokens."""

    def __init__(self, model: EngramLMForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, autocast: torch.dtype | None = None) -> Tensor:
        """A scalar, float32. autocast: the dtype of the blocks' matrix products."""
        device = self.model.device.type
        with torch.autocast(device, autocast, enabled=autocast is not None):
            hidden_BTD = self.model.model(
                input_ids=batch.inputs_BT, position_ids=batch.positions_BT, use_cache=False
            ).last_hidden_state
        if not batch.targets_BT.numel():
            return hidden_BTD.sum().float() * 0.0
        # In pieces and in float32: less time and memory than the logits of all tokens at once.
        return F.linear_cross_entropy(
            hidden_BTD.flatten(0, 1).float(),
            self.model.lm_head.weight,
            batch.targets_BT.flatten(),
            options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512),
        )
