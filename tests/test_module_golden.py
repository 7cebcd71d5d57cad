"""Fusion and table against the authors' demo module, float32, forward and every gradient.

Which weight is which: key_projs.{m} and value_proj are the blocks of kv (keys first, value last),
norm1.{m} the key norms, norm2.{m} the query norms, short_conv.norms.{m} and short_conv.conv ours by
the same names; multi_head_embedding.embedding is the table.
"""

import json

import pytest
import torch
from conftest import GOLDEN
from safetensors import safe_open

from engram_lm.config import FusionConfig
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.fuse import Fuse
from engram_lm.memory.lookup import Memory
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.specification import Specification
from engram_lm.memory.table import Table

FILES = ["demo_module", "demo_module_single_stream"]
# Both sides are float32 sums of a few hundred terms in another order: 1e-5 of the largest entry.
TOLERANCE = 1e-5


class Case:
    def __init__(
        self, name: str, deepseek: CanonicalMap, dtype: torch.dtype = torch.float32
    ) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            meta = file.metadata()
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        streams, width, heads = int(meta["hc_mult"]), int(meta["hidden"]), int(meta["heads"])
        rows = tuple(json.loads(meta["rows_per_head_base"]))
        self.layer = int(meta["layer"])
        specification = Specification(
            layers=(self.layer,), rows_per_head=rows, heads=heads, seed=int(meta["seed"]), pad_id=2
        )
        head_dim = int(meta["embed_per_order"]) // heads
        self.table = Table(specification.table_rows(self.layer), head_dim, dtype=dtype)
        self.memory = Memory(Addresses(specification, deepseek), {self.layer: self.table})
        config = FusionConfig(bias=True, conv_kernel=int(meta["kernel"]))
        memory_dim = head_dim * heads * len(rows)
        self.fuse = Fuse(streams, width, memory_dim, config, specification.max_order).to(dtype)
        assert self.fuse.conv.dilation == int(meta["dilation"])
        with torch.no_grad():
            self.table.weight.copy_(self["weight.multi_head_embedding.embedding.weight"])
            for parameter, value in self.pairs("weight"):
                parameter.copy_(value)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def pairs(self, kind: str):
        """(our parameter or its gradient, the recorded value) for everything but the table."""
        streams, fuse = self.fuse.streams, self.fuse

        def stack(name: str) -> torch.Tensor:
            return torch.stack([self[f"{kind}.{name.format(m)}"] for m in range(streams)])

        for part in ("weight", "bias"):
            keys = stack(f"key_projs.{{}}.{part}").flatten(0, 1)
            yield getattr(fuse.kv, part), torch.cat([keys, self[f"{kind}.value_proj.{part}"]])
        yield fuse.key_norm_weight, stack("norm1.{}.weight")
        yield fuse.query_norm_weight, stack("norm2.{}.weight")
        yield fuse.conv.norm_weight, stack("short_conv.norms.{}.weight")
        conv = self[f"{kind}.short_conv.conv.weight"]
        yield fuse.conv.weight, conv.unflatten(0, (streams, -1)).squeeze(2)

    def run(self):
        dtype = self.fuse.kv.weight.dtype
        hidden = self["hidden_states"].to(dtype).requires_grad_()
        pending = self.memory.start(self["token_ids"])
        update = self.fuse(hidden, pending.wait(self.layer), pending.window).update_BTSD
        update.backward(self["grad_output"].to(dtype))
        return hidden, update


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize("name", FILES)
def test_output_equals_the_demo_modules(name, deepseek):
    case = Case(name, deepseek)
    _, update = case.run()
    assert_close(update.detach(), case["output"])


@pytest.mark.parametrize("name", FILES)
def test_every_recorded_gradient_equals_the_demo_modules(name, deepseek):
    case = Case(name, deepseek)
    hidden, _ = case.run()
    assert_close(hidden.grad, case["grad_hidden_states"])
    for parameter, gradient in case.pairs("grad"):
        assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("name", FILES)
def test_row_gradient_equals_autograd_through_an_indexed_float64_table(name, deepseek):
    ours, slow = Case(name, deepseek), Case(name, deepseek, torch.float64)
    ours.run()
    weight = slow.table.weight.detach().clone().requires_grad_()
    pending = slow.memory.start(slow["token_ids"])
    vectors = weight[pending.rows_LBTH[0]].flatten(2)
    update = slow.fuse(slow["hidden_states"].double(), vectors, pending.window).update_BTSD
    (update * slow["grad_output"].double()).sum().backward()
    dense = torch.zeros_like(weight)
    rows, values = ours.table.row_gradient
    dense[rows] = values.double()
    assert_close(dense, weight.grad)
    assert ours.table.weight.grad is None
