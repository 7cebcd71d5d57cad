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
        if not batch.targets_BT.numel():
            return self._nothing(autocast)
        device = self.model.device.type
        with torch.autocast(device, autocast, enabled=autocast is not None):
            hidden_BTD = self.model.model(
                input_ids=batch.inputs_BT, position_ids=batch.positions_BT, use_cache=False
            ).last_hidden_state
        # In pieces and in float32: less time and memory than the logits of all tokens at once.
        return F.linear_cross_entropy(
            hidden_BTD.flatten(0, 1).float(),
            self.model.lm_head.weight,
            batch.targets_BT.flatten(),
            options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512),
        )

    def _nothing(self, autocast: torch.dtype | None) -> Tensor:
        """For a worker without tokens: the same collectives, the same parameters with a gradient.

        Most of transformers' modules refuse an empty batch, so one token goes through them, in
        evaluation mode: no router's load is counted, and no row is read.
        """
        model, training = self.model, self.model.training
        device = model.device
        model.eval()
        try:
            with model.model.serving(), torch.autocast(device.type, autocast, autocast is not None):
                hidden_BTD = model.model(
                    input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False
                ).last_hidden_state
        finally:
            model.train(training)
        return F.linear(hidden_BTD.float(), model.lm_head.weight).sum() * 0.0
