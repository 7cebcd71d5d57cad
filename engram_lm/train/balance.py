"""Loss-free load balancing: a routing bias, moved after each step towards the experts with less
load.

arXiv 2408.15664, used by the paper's backbones. No auxiliary loss, no gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter


class Balancer:
    """Counts what every router of a model chooses in training, and moves its bias."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.routers = [m for m in model.modules() if isinstance(m, DeepseekV3TopkRouter)]
        self.loads: list[Tensor | None] = [None] * len(self.routers)
        self._hooks = [
            router.register_forward_hook(self._counter(index))
            for index, router in enumerate(self.routers)
        ]

    def close(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def step(self, move: bool = True) -> float:
        """Moves the biases by `rate`; returns an expert's largest load over the mean (1: even).

        move: False for a step that was not taken: its counts are dropped.
        """
        worst = 1.0 if not self.routers else 0.0
        for index, router in enumerate(self.routers):
            load = self.loads[index]
            if load is not None:
                if move:
                    direction = torch.sign(load.float().mean() - load)
                    router.e_score_correction_bias.add_(direction, alpha=self.rate)
                worst = max(worst, float(load.max() / load.float().mean()))
            self.loads[index] = None
        return worst

    def _counter(self, index: int) -> Any:
        def count(router: DeepseekV3TopkRouter, inputs: Any, outputs: Any) -> None:
            if router.training:
                load = torch.bincount(outputs[2].reshape(-1), minlength=router.num_experts)
                earlier = self.loads[index]
                self.loads[index] = load if earlier is None else earlier + load

        return count
