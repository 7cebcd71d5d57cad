"""Ledgers against real models, and twins."""

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from engram_lm.config import FusionConfig, MemoryConfig
from engram_lm.errors import ConfigError
from engram_lm.memory.specification import Specification
from engram_lm.model import EngramLMForCausalLM
from engram_lm.model.budget import ledger
from engram_lm.model.presets import configure, nano_engram, nano_moe
from engram_lm.model.twin import twin
from engram_lm.train.optimizers import groups

VARIANTS = [
    {},
    {"streams": 4},
    {"conv": False, "orders": 3},
    {"memory": None, "streams": 2},
    {"q_lora_rank": 12, "tie_word_embeddings": False},
    {"mlp_layer_types": ["dense"] * 3},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_parameter_of_a_model_is_in_its_ledger(variant):
    model = tiny_model(**variant)
    assert ledger(model.config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_flops_equal_torchs_counter(variant):
    model = tiny_model(**variant)
    # Eager, because torch's counter does not know sdpa's CPU kernel; experts run one by one.
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(2, 97, (2, 32)), use_cache=False)
    assert counter.get_total_flops() == 64 * ledger(model.config, context=32).flops


def test_biases_are_in_the_ledger():
    specification = Specification(layers=(1,), rows_per_head=(50,), heads=2, pad_id=1)
    memory = MemoryConfig(specification=specification, head_dim=4, fusion=FusionConfig(bias=True))
    config = tiny_config(streams=2, memory=memory.to_dict())
    model = EngramLMForCausalLM(config)
    assert ledger(config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_optimizer_bytes_are_those_of_the_optimisers_moments(variant):
    model = tiny_model(**variant)
    found = groups(model)
    muon = sum(p.numel() for p in [*found.matrices, *found.stacks])
    adam = sum(p.numel() for p in found.others)
    adam += sum(table.weight.numel() for table in found.tables)
    assert ledger(model.config).optimizer_bytes == 4 * muon + 8 * adam


@pytest.mark.parametrize("rho", [0.9, 0.75, 0.5, 0.4])
def test_twins_have_equal_parameters_and_flops_and_lead_back(rho):
    moe = nano_moe()
    engram = twin(moe, rho)
    one, other = ledger(moe), ledger(engram)
    assert other.p_tot == pytest.approx(one.p_tot, rel=0.005)
    assert other.p_act == pytest.approx(one.p_act, rel=0.005)
    assert other.flops == pytest.approx(one.flops, rel=0.005)
    assert other.rho == pytest.approx(rho, abs=0.03)  # half an expert of 30
    back = twin(engram, 1.0)
    assert back.to_dict() == moe.to_dict()


def test_twin_models_really_have_the_parameters_of_their_ledgers():
    for config in (nano_moe(), nano_engram()):
        with torch.device("meta"):
            model = EngramLMForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == ledger(config).parameters


def test_the_twin_pays_for_its_projections_with_its_shared_expert():
    moe, engram = nano_moe(), nano_engram()
    assert engram.shared_intermediate_size < moe.shared_intermediate_size
    assert engram.n_routed_experts < moe.n_routed_experts
    assert ledger(engram)["Engram projections"].active > 0.05 * ledger(engram).p_act


@pytest.mark.parametrize(
    ("change", "rho", "message"),
    [
        ({}, 1.5, "rho=1.5"),
        ({"mlp_layer_types": ["dense"] * 6}, 0.5, "nothing to move"),
        ({"shared_intermediate_size": 8}, 0.75, "too narrow to pay"),
        ({}, 0.999, "do not fill"),
    ],
)
def test_twins_that_cannot_be_are_refused(change, rho, message):
    with pytest.raises(ConfigError, match=message):
        twin(configure(nano_moe(), change), rho)
