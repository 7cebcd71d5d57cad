"""Values of a wrong type are refused where they are given: one line, and never a raw TypeError."""

from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from families import bare, memory
from tiny import canonical_map, tiny_config, tiny_model

import engram_lm
from engram_lm.config import nano
from engram_lm.errors import ConfigError, EngramError
from engram_lm.memory.specification import Specification, Vocabulary
from engram_lm.model.presets import nano_moe

WRONG = (None, "x", 1.5, True, [1.5], ["x"], {}, object(), b"1", float("nan"), torch.zeros(2))
RULES = {
    "layers": (0, 2),
    "rows_per_head": (50, 50),
    "heads": 2,
    "seed": 0,
    "pad_id": 1,
    "rows_multiple": 1,
    "canonical_rule": "folded",
    "multiplier_rule": "pcg64",
    "prime_rule": "distinct",
    "boundary_rule": "cross",
}
SPECIFICATION = Specification(**RULES)
FORMAT = engram_lm.RowFormat(dtype=torch.bfloat16, dim=4)
BYTES = torch.zeros(20, 8, dtype=torch.uint8)
STORE = engram_lm.Resident(BYTES, FORMAT)
REGION = {"path": Path("rows"), "offset": 0, "rows": 20, "row_bytes": 8}
RATES = {"lr": 1e-3, "table_lr_multiplier": 5.0, "weight_decay": 0.1}
TABLES = [engram_lm.Table(20, 4)]


def addresses() -> engram_lm.Addresses:
    return engram_lm.Addresses(SPECIFICATION, canonical_map())


CALLS = {
    "Addresses": lambda: {"specification": SPECIFICATION, "canonical": canonical_map()},
    "AttachedForCausalLM": lambda: {"config": None},
    "Cache": lambda: {"slower": STORE, "budget_bytes": 10_000},
    "CanonicalMap": lambda: {"ids_V": torch.arange(4)},
    "CompiledAddresses": lambda: {"specification": SPECIFICATION, "canonical": canonical_map()},
    "Disk": lambda: {
        "format": FORMAT,
        "parts": [[engram_lm.Region(**REGION)]],
        "ahead_bytes": 0,
    },
    "EngramCallback": lambda: {"balance_rate": 1e-3},
    "EngramLMConfig": lambda: {"hidden_size": 32, "streams": 1, "rms_norm_eps": 1e-6},
    "EngramLMForCausalLM": lambda: {"config": tiny_config()},
    "EngramLMModel": lambda: {"config": tiny_config()},
    "FusionConfig": lambda: {
        "gate": "plain",
        "bias": False,
        "conv_kernel": 4,
        "norm_eps": 1e-6,
        "conv_norm_eps": 1e-6,
        "zero_centered_norms": False,
    },
    "Host": lambda: {"descriptor": 0, "format": FORMAT},
    "JointOptimizer": lambda: {"model": tiny_model(), **RATES, "clip": 1.0, "precision": "fp32"},
    "Memory": lambda: {"addresses": addresses(), "stores": {0: TABLES[0], 2: TABLES[0]}},
    "MemoryConfig": lambda: {
        "specification": SPECIFICATION,
        "head_dim": 4,
        "fusion": engram_lm.FusionConfig(),
    },
    "Overlay": lambda: {"base": STORE, "rows_K": torch.tensor([1]), "bytes_KR": BYTES[:1]},
    "Region": lambda: REGION,
    "Released": lambda: {"directory": "nowhere"},
    "Resident": lambda: {"bytes_VR": BYTES, "format": FORMAT},
    "RowAdam": lambda: {"tables": TABLES, "lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "seed": 0},
    "RowFormat": lambda: {"dtype": torch.int8, "dim": 4, "scale_group": 4},
    "RowwiseRMSprop": lambda: {"tables": TABLES, "lr": 1e-3, "beta2": 0.99, "eps": 1e-8, "seed": 0},
    "Specification": lambda: RULES,
    "Table": lambda: {"rows": 4, "dim": 4},
    "Workers": lambda: {"rank": 0, "size": 1, "device": torch.device("cpu")},
    "attach": lambda: {"model": bare("llama"), "tokenizer": canonical_map(), "memory": memory()},
    "detach": lambda: {"model": bare("llama")},
    "give_memory": lambda: {
        "model": tiny_model(memory=None),
        "memory": memory(),
        "tokenizer": canonical_map(),
    },
    "ledger": lambda: {"config": nano_moe(), "context": 8},
    "param_groups": lambda: {"model": tiny_model(), **RATES},
    "preset": lambda: {"name": "nano-moe"},
    "readdress": lambda: {"model": tiny_model(), "specification": SPECIFICATION, "reads": ()},
    "replicate_tables": lambda: {"model": tiny_model()},
    "save_pack": lambda: {"model": tiny_model(), "directory": "nowhere"},
    "shard_tables": lambda: {
        "model": tiny_model(),
        "group": None,
        "replicas": None,
        "seed": 0,
        "std": 0.02,
    },
    "twin": lambda: {"config": nano_moe(), "rho": 0.75, "memory": nano()},
}
"""Every public name that is called, with values that it takes (or refuses for no type's sake)."""
WAYS = {
    "CanonicalMap.identity": {"token_ids": 4},
    "CanonicalMap.from_tokenizer": {"tokenizer": None},
    "CanonicalMap.load": {"path": "nowhere"},
    "Host.attach": {"address": "nowhere", "format": FORMAT},
    "Host.of": {"store": STORE},
    "MemoryConfig.from_dict": {"record": []},
    "Resident.of": {"store": STORE},
    "RowFormat.named": {"name": "fp32", "dim": 4},
    "Specification.from_dict": {"record": []},
    "Specification.load": {"path": "nowhere"},
    "Workers.join": {"device": "cpu"},
}
"""Other ways to make one."""
OPTIONAL = {
    *("FusionConfig.conv_kernel", "JointOptimizer.clip", "RowFormat.scale_group"),
    *("attach.memory", "readdress.reads", "twin.memory"),
    *("shard_tables.group", "shard_tables.replicas", "shard_tables.seed"),
}
"""What may be None."""


def fits(name: str, wrong: object, right: object) -> bool:
    """Whether a value of WRONG is none for this argument."""
    if wrong is None:
        return name in OPTIONAL
    return type(wrong) is type(right) or (name, type(wrong)) == ("Region.path", str)


@pytest.mark.parametrize("name", [*CALLS, *WAYS])
def test_every_public_call_refuses_wrong_types_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, values = attrgetter(name)(engram_lm), WAYS[name] if name in WAYS else CALLS[name]()
    for argument, right in values.items():
        for wrong in WRONG:
            if fits(f"{name}.{argument}", wrong, right):
                continue
            with pytest.raises(EngramError) as refusal:
                call(**{**values, argument: wrong})
            assert "\n" not in str(refusal.value), argument
            assert len(str(refusal.value)) < 400, argument
    assert not list(tmp_path.iterdir())


def test_every_public_name_that_takes_values_is_tried():
    errors = {n for n in engram_lm.__all__ if n.endswith(("Error", "Warning"))}
    # Trainer's own arguments are transformers' to check; ours are taken from them.
    others = {"RowStore", "unallocated", "EngramTrainer", "EngramTrainerMixin"}
    assert set(engram_lm.__all__) == set(CALLS) | errors | others


def test_a_missing_pad_token_is_told_which_id_to_take():
    with pytest.raises(ConfigError, match=r"pad_id=None: .* pad_token_id or, .* eos_token_id"):
        Specification(**{**RULES, "pad_id": None})


def test_numpys_integers_and_lists_are_the_same_specification():
    same = Specification(
        **{
            **RULES,
            "layers": [np.int64(0), np.int32(2)],
            "rows_per_head": list(np.array([50, 50])),
            "pad_id": np.uint8(1),
            "heads": np.int64(2),
        }
    )
    assert same == SPECIFICATION and hash(same) == hash(SPECIFICATION)
    assert same.digest == SPECIFICATION.digest


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_rates_are_finite_and_not_negative(wrong):
    model = tiny_model(memory=None)
    for name in RATES:
        for call in (engram_lm.JointOptimizer, engram_lm.param_groups):
            with pytest.raises(ConfigError, match=name):
                call(model, **{**RATES, name: wrong})
    for kind in (engram_lm.RowAdam, engram_lm.RowwiseRMSprop):
        with pytest.raises(ConfigError, match="lr="):
            kind(TABLES, lr=wrong)


def test_vocabularies_hold_counts_and_a_checksum():
    facts = {"token_ids": 5, "canonical_ids": 4, "sha256": "0" * 64}
    for change in ({"token_ids": "5"}, {"canonical_ids": 0}, {"sha256": None}):
        with pytest.raises(ConfigError, match=f"vocabulary.{next(iter(change))}="):
            Vocabulary(**{**facts, **change})
