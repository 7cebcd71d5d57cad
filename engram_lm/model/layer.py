"""One block: memory where there is one, then attention and FFN.

Shapes: B sequences, T tokens, S streams, D width, M memory width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3MLP,
    DeepseekV3MoE,
    DeepseekV3RMSNorm,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from engram_lm.memory.fuse import Fuse
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.reading import Reading


class EngramLMMoE(DeepseekV3MoE):
    """DeepSeekMoE whose shared expert may have any width."""

    def __init__(self, config: EngramLMConfig) -> None:
        super().__init__(config)
        self.shared_experts = DeepseekV3MLP(config, config.shared_intermediate_size)


class EngramLMDecoderLayer(GradientCheckpointingLayer):
    """Memory (where there is one), attention, FFN; each on the plain residual or on mHC streams."""

    def __init__(self, config: EngramLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.streams = config.streams
        memory = config.memory_config
        self.engram = None
        if memory is not None and layer_idx in memory.specification.layers:
            self.engram = Fuse(
                config.streams,
                config.hidden_size,
                memory.memory_dim,
                memory.fusion,
                memory.specification.max_order,
            )
        self.self_attn = DeepseekV3Attention(config, layer_idx)
        sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.mlp = EngramLMMoE(config) if sparse else DeepseekV3MLP(config)
        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.streams > 1:
            self.attn_hc = DeepseekV4HyperConnection(config)
            self.ffn_hc = DeepseekV4HyperConnection(config)

    def forward(
        self,
        hidden_states: Tensor,
        vectors: Tensor | None = None,
        reading: Reading | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, T, D), or (B, T, S, D) with more streams than one. vectors: (B, T, M)."""
        if self.engram is not None and vectors is not None:
            assert reading is not None
            hidden_states = hidden_states + self._remember(hidden_states, vectors, reading)
        if self.streams == 1:
            residual = hidden_states
            hidden_states, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            hidden_states = residual + hidden_states
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        post, comb, collapsed = self.attn_hc(hidden_states)
        output, _ = self.self_attn(self.input_layernorm(collapsed), **kwargs)
        hidden_states = _expand(hidden_states, output, post, comb)
        post, comb, collapsed = self.ffn_hc(hidden_states)
        output = self.mlp(self.post_attention_layernorm(collapsed))
        return _expand(hidden_states, output, post, comb)

    def _remember(self, hidden_states: Tensor, vectors: Tensor, reading: Reading) -> Tensor:
        assert self.engram is not None
        hidden_BTSD = hidden_states if self.streams > 1 else hidden_states.unsqueeze(2)
        update_BTSD = reading.update(self.layer_idx, self.engram, hidden_BTSD, vectors)
        return update_BTSD if self.streams > 1 else update_BTSD.squeeze(2)


def _expand(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    # As in DeepSeek-V4's block: comb is doubly stochastic but not symmetric, and is used
    # transposed.
    mixed = torch.matmul(comb.to(streams.dtype).transpose(-1, -2), streams)
    return (post.to(output.dtype).unsqueeze(-1) * output.unsqueeze(-2) + mixed).contiguous()
