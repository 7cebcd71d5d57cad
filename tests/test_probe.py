"""What a family can do is found out on a small copy of it, and what it cannot is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from families import _SIZES, bare, memory, speak
from tiny import canonical_map
from transformers import AutoModelForCausalLM, DynamicCache

import engram_lm
from engram_lm.errors import ConfigError, DataError
from engram_lm.model import attach, probe
from engram_lm.model.limits import check
from engram_lm.model.small_copy import decoder_layers

ROOT = Path(__file__).parents[1]
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
MADE = {
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_chunk_size": 8},
    "bamba": {**MAMBA, "mamba_chunk_size": 8, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        **MAMBA,
        "mamba_chunk_size": 8,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 48,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "cohere2": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "biogpt": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4},
    "smollm3": {},
    "starcoder2": {},
}
"""Families, with sizes that keep them small; none of them is named in the package."""
RECURRENT = {probe.PACKED, probe.MASKED, probe.AFTER, probe.LATER}
REFUSED = {
    "falcon_h1": RECURRENT | {probe.CROP},
    "bamba": RECURRENT | {probe.UNPLACED, probe.CROP},
    "granitemoehybrid": RECURRENT | {probe.CROP},
    "jamba": RECURRENT | {probe.CHUNKS, probe.CROP},
    "recurrent_gemma": RECURRENT | {probe.LEFT, probe.LEFT_UNPLACED, probe.CHUNKS, probe.CROP},
    "lfm2": RECURRENT,
    "gpt_oss": {probe.PACKED, probe.AFTER},
    "cohere2": {probe.AFTER},
    "biogpt": {probe.PACKED, probe.LEFT_UNPLACED},
    "xglm": {probe.PACKED, probe.LEFT_UNPLACED},
    "smollm3": set(),
    "starcoder2": set(),
}


def made(family: str):
    kind = transformers.CONFIG_MAPPING[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**_SIZES, **MADE[family]}))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", MADE)
def test_what_the_bare_family_gets_wrong_is_refused_by_name_and_all_else_is_right(family):
    model = made(family)
    engram_lm.attach(model, canonical_map(), memory())
    speak(model)
    assert set(model.config.refused_modes) == REFUSED[family]
    with_memory = probe.measure(model)
    for mode in probe.MODES:
        problem = with_memory.get(mode)
        if mode not in REFUSED[family]:
            # A crop's draft is several tokens, so it is refused where chunks are.
            assert problem is None, f"{mode}: {problem}"
        else:
            assert problem is not None and not problem.startswith("its logits"), mode
            assert problem.startswith(("ConfigError: ", "RuntimeError: crop: ")), problem


def test_a_small_copy_of_a_large_model_is_tried_and_that_once(monkeypatch):
    config = transformers.Qwen3NextConfig()  # 48 layers of width 2,048
    with torch.device("meta"):
        model = transformers.Qwen3NextForCausalLM(config)
    before, state = config.to_dict(), torch.random.get_rng_state()
    layers = decoder_layers(model.model)
    verdict = probe.probe(type(model), config, layers)
    assert set(verdict) == RECURRENT | {probe.CROP}
    assert config.to_dict() == before and torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(probe, "small_copy", None)
    assert probe.probe(type(model), config, layers) == verdict


def test_what_the_caller_is_in_the_middle_of_changes_no_verdict(monkeypatch):
    default = torch.get_default_dtype()
    for surroundings in (
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        torch.inference_mode(),
    ):
        monkeypatch.setattr(probe, "_VERDICTS", {})
        model = bare("llama")
        with surroundings:
            assert probe.probe(type(model), model.config, model.model.layers) == {}
    monkeypatch.setattr(probe, "_VERDICTS", {})
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert probe.probe(type(model), model.config, model.model.layers) == {}
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(default)


def test_a_window_that_no_text_fills_is_none_and_a_changed_one_is_asked_of_anew(tmp_path):
    assert made_mistral(4096).config.refused_modes == {}
    assert set(made_mistral(6).config.refused_modes) == {probe.AFTER}
    made_mistral(None).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.refused_modes == {}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, sliding_window=6)
    assert set(opened.model.refused_modes) == {probe.AFTER}
    record = json.loads((tmp_path / "config.json").read_text())
    for wrong in ("packed documents", 5, ["crop"], {"crop": None}):
        (tmp_path / "config.json").write_text(json.dumps({**record, "refused_modes": wrong}))
        with pytest.raises(DataError, match="refused_modes="):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def made_mistral(window):
    return engram_lm.attach(bare("mistral", sliding_window=window), canonical_map(), memory())


def test_right_padding_that_no_text_follows_is_let_pass_under_any_mask():
    model = made_mistral(6)
    ids, mask = torch.arange(8)[None] + 3, torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    seen = torch.ones(8, 8).tril()[None, None] * mask[:, None, None]
    hidden = torch.zeros(seen.shape).masked_fill(seen == 0, torch.finfo().min)
    model(ids, attention_mask=hidden, padding_mask=mask, use_cache=False)
    with pytest.raises(ConfigError, match="text after right padding"):
        model(ids, attention_mask=hidden, padding_mask=mask, use_cache=True)


def test_the_verdict_is_saved_and_asked_anew_of_another_transformers(tmp_path, monkeypatch):
    model = made("gpt_oss")
    engram_lm.attach(model, canonical_map(), memory())
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(probe, "_VERDICTS", {})
    asked = []
    measure = probe.measure
    monkeypatch.setattr(probe, "measure", lambda copy: asked.append(copy) or measure(copy))
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "use_cache": False}
    ids = torch.arange(5)[None] + 3
    for version, times in ((transformers.__version__, 0), ("5.22.0", 1), (None, 1)):
        record = json.loads((tmp_path / "config.json").read_text())
        assert set(record["refused_modes"]) == REFUSED["gpt_oss"]
        record["transformers_version"] = version
        (tmp_path / "config.json").write_text(json.dumps(record))
        opened = AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="^packed documents: GptOssModel gets it wrong"):
            opened(ids, **packed)
        assert len(asked) == times


def test_a_model_of_which_no_copy_can_be_made_has_no_mode_that_was_not_tried(monkeypatch):
    monkeypatch.setattr(probe, "_VERDICTS", {})
    monkeypatch.setattr(probe, "small_copy", lambda *each: None)
    model = bare("llama")
    engram_lm.attach(model, canonical_map(), memory())
    assert set(model.config.refused_modes) == set(probe.MODES)
    ids = torch.arange(6)[None] + 3
    model(ids)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ConfigError, match="no small copy of the model could be made"):
        model(ids, past_key_values=cache)


def test_calls_that_are_in_no_refused_mode_are_not_looked_at():
    refused = dict.fromkeys(probe.MODES, "")
    mask = torch.ones(2, 4, dtype=torch.int64)
    positions = torch.arange(4)[None]
    for each in (None, mask, mask[:, None, None].bool()):
        check("Family", refused, 4, None, each, None, positions, placed=True)
    with pytest.raises(ConfigError, match="left padding: Family"):
        mask[1, 0] = 0
        check("Family", refused, 4, None, mask, None, positions, placed=True)


@pytest.mark.parametrize("planes", [1, 3, 4])
def test_position_ids_in_every_shape_that_a_family_takes(planes):
    if planes == 1:  # GPT-2's learned positions take (T,) too
        config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4)
        model, positions = transformers.GPT2LMHeadModel(config).eval(), torch.arange(7)
    else:
        model, positions = qwen3_5(), torch.arange(7).expand(planes, 1, -1)
    ids = torch.arange(7)[None] + 3
    engram_lm.attach(model, canonical_map(), memory())
    speak(model)
    wanted = model(ids, use_cache=False).logits
    assert torch.equal(model(ids, position_ids=positions, use_cache=False).logits, wanted)


def qwen3_5():
    kind = transformers.CONFIG_MAPPING["qwen3_5_text"]
    heads = {f"linear_num_{name}_heads": 2 for name in ("key", "value")}
    dims = {f"linear_{name}_head_dim": 8 for name in ("key", "value")}
    types = ["linear_attention", "full_attention"] * 2
    sizes = {**_SIZES, **heads, **dims, "layer_types": types}
    return AutoModelForCausalLM.from_config(kind(**sizes)).eval()


def test_every_failure_of_attach_is_one_line_of_ours_and_leaves_the_model(monkeypatch):
    def gemma3n():
        kind = transformers.CONFIG_MAPPING["gemma3n_text"]
        return AutoModelForCausalLM.from_config(
            kind(
                **{**_SIZES, "sliding_window": 6, "layer_types": ["full_attention"] * 4},
                num_kv_shared_layers=0,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=97,
                altup_num_inputs=2,
                laurel_rank=4,
                activation_sparsity_pattern=None,
            )
        )

    def stumbles():
        model = bare("llama")
        model.model.layers[3].forward = lambda *args, **kwargs: 1 / 0
        return model

    for make in (gemma3n, stumbles):
        model = make().train()
        config, kinds = model.config, [type(part) for part in model.modules()]
        record = config.to_dict()
        with pytest.raises(ConfigError) as caught:
            engram_lm.attach(model, canonical_map(), memory())
        assert "\n" not in str(caught.value) and "no memory can be given" in str(caught.value)
        assert model.config is config and config.to_dict() == record
        assert [type(part) for part in model.modules()] == kinds
        for part in model.modules():
            assert part.training and not part._forward_pre_hooks and not hasattr(part, "engram")
            assert getattr(part, "config", config) is config
    for wrong in ("a tokenizer", 7, None):
        with pytest.raises(engram_lm.EngramError):
            engram_lm.attach(bare("llama"), wrong, memory())
    # Names that were not the configuration's.
    model = bare("llama")
    model.name_or_path, model.model.name_or_path = "outer", "inner"
    with pytest.raises(engram_lm.EngramError):
        engram_lm.attach(model, torch.arange(3), memory())
    monkeypatch.setattr(attach, "_try", lambda model: 1 / 0)
    with pytest.raises(ConfigError):
        engram_lm.attach(model, canonical_map(), memory())
    assert (model.name_or_path, model.model.name_or_path) == ("outer", "inner")
    # Stopped by the user, in the middle of it.
    model = bare("llama")
    monkeypatch.setattr(attach, "_try", lambda model: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engram_lm.attach(model, canonical_map(), memory())
    assert type(model) is transformers.LlamaForCausalLM and not hasattr(model.config, "memory")


def test_the_table_of_families_is_the_one_that_the_script_measured():
    spec = importlib.util.spec_from_file_location("families_table", ROOT / "benchmarks/families.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    record = json.loads((ROOT / "results" / "families.json").read_text())
    page = (ROOT / "docs" / "families.md").read_text()
    assert page.split(script.BEGIN)[1].split(script.END)[0] == script.page(record["raw"])
    assert record["summary"]["faults"] == 0
    assert record["raw"]["transformers"].startswith("5.23.")
