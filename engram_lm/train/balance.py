"""Loss-free load balancing: a routing bias, moved after each step towards the experts with less
load.

arXiv 2408.15664, used by the paper's backbones. No auxiliary loss, no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.train.workers import Workers


class Balancer:
    """Counts what every router of a model of ours chooses in training, and moves its bias; not a
    frozen router's. Another family's experts, with a memory attached or not, are balanced as that
    family does it.

    Shapes: L routers, E experts of each.
    """

    def __init__(self, model: Any, rate: float, workers: Workers) -> None:
        ours = isinstance(model, EngramLMForCausalLM)
        self.workers = workers
        self.rate, self.experts = rate, model.config.n_routed_experts if ours else 0
        self.routers: dict[int, DeepseekV3TopkRouter] = {
            layer: module
            for layer, block in enumerate(model.model.layers if ours else ())
            for module in block.modules()
            if isinstance(module, DeepseekV3TopkRouter) and module.weight.requires_grad
        }
        """By layer."""
        self.device = model.device
        self.loads_LE = self._nothing()
        self._hooks = [
            router.register_forward_hook(self._counter(index))
            for index, router in enumerate(self.routers.values())
        ]

    def close(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def step(self, move: bool = True) -> Tensor:
        """Moves the biases by `rate`; returns how often each expert was chosen since the last
        call, by all workers, (L, E) int64.

        move: False for a step that was not taken: its counts are dropped.
        """
        loads_LE, self.loads_LE = self.workers.sum(self.loads_LE), self._nothing()
        for router, load_E in zip(self.routers.values(), loads_LE, strict=True):
            if move:
                direction_E = torch.sign(load_E.float().mean() - load_E)
                router.e_score_correction_bias.add_(direction_E, alpha=self.rate)
        return loads_LE

    def _nothing(self) -> Tensor:
        shape = (len(self.routers), self.experts)
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def _counter(self, index: int) -> Any:
        def count(router: DeepseekV3TopkRouter, inputs: Any, outputs: Any) -> None:
            if router.training:
                chosen = outputs[2].reshape(-1)
                # Not bincount, which on a GPU waits for the largest value.
                self.loads_LE[index].index_add_(0, chosen, torch.ones_like(chosen))

        return count
