"""Which precision is chosen where, and that Muon, runs and opened models follow the choice."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from families import bare
from rich.console import Console
from test_train import CONFIG, finish, parts, small_model, start  # noqa: F401
from torch import nn
from torch.optim._muon import (
    DEFAULT_A,
    DEFAULT_B,
    DEFAULT_C,
    DEFAULT_NS_STEPS,
    EPS,
    _zeropower_via_newtonschulz,
)

from engram_lm import JointOptimizer, corpus, precision
from engram_lm.cli.models import open_model
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.studies import demo as demo_study
from engram_lm.train.config import TrainConfig
from engram_lm.train.muon import Muon, orthogonalised

SHAPES = [(3, 5), (64, 32), (32, 64), (128, 128), (7, 300), (96, 128), (1, 17)]
AMX = {"amx_bf16": True, "avx512_bf16": True, "avx2": True}
ZEN4 = {"amx_bf16": False, "avx512_bf16": True, "avx2": True}
AVX2 = {"amx_bf16": False, "avx512_bf16": False, "avx2": True}


@pytest.fixture
def cpu(monkeypatch):
    """Makes this process's CPU one with these features, of which torch uses those of `level`."""

    def make(features: dict, level: str = "AVX512", architecture: str = "x86_64") -> None:
        precision.fast_products.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
        monkeypatch.setattr(precision.platform, "machine", lambda: architecture)

    yield make
    precision.fast_products.cache_clear()


@pytest.mark.parametrize(
    ("features", "level", "wanted"),
    [
        (AMX, "AVX512", "bf16"),
        (ZEN4, "AVX512", "bf16"),
        (AVX2, "AVX2", "fp32"),
        (AMX, "AVX2", "fp32"),  # torch was told to use it as an AVX2 one
    ],
)
def test_auto_is_bf16_where_the_cpu_multiplies_it(cpu, features, level, wanted):
    cpu(features, level)
    chosen = precision.choose("auto")
    assert chosen.name == wanted
    assert chosen.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]
    assert chosen.autocast == (torch.bfloat16 if wanted == "bf16" else None)
    assert ("no bfloat16 products in hardware" in str(chosen)) == (wanted == "fp32")
    for name in ("bf16", "fp32"):  # what is asked for is taken, on any machine
        assert precision.choose(name).name == name


@pytest.mark.parametrize("half", [2.0, 0.5])
def test_other_cpus_are_asked_by_a_product(cpu, monkeypatch, half):
    cpu({}, "DEFAULT", "aarch64")
    monkeypatch.setattr(precision, "_seconds", {torch.float32: 1.0, torch.bfloat16: half}.get)
    assert precision.choose("auto").name == ("fp32" if half > 1 else "bf16")


def test_a_product_is_timed_where_nothing_else_tells(cpu):
    cpu({}, "DEFAULT", "aarch64")
    chosen = precision.choose("auto")
    times = float(re.fullmatch(r"bfloat16 products take (.+)x the time of .+", chosen.reason)[1])
    if times != 1:  # rounded to two digits: at 1.00 either is right
        assert chosen.name == ("bf16" if times < 1 else "fp32")


def test_other_devices_and_other_words():
    assert precision.choose("auto", "meta").name == "fp32"
    with pytest.raises(ConfigError, match=r"precision='fp16': accepted are auto, bf16, fp32"):
        precision.choose("fp16")
    with pytest.raises(ConfigError, match=r"precision='half': accepted are auto and bf16 and fp32"):
        TrainConfig(precision="half")


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalisation_in_bf16_has_torchs_own_bits(shape):
    for scale in (1e-3, 1.0, 1e3):
        gradient = torch.randn(shape) * scale
        theirs = _zeropower_via_newtonschulz(
            gradient, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS
        )
        assert torch.equal(orthogonalised(gradient), theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalisation_in_fp32_is_float64s(shape):
    stack = torch.randn(4, *shape)
    exact = orthogonalised(stack.double(), torch.float64)
    alone = orthogonalised(stack[1].double(), torch.float64)
    torch.testing.assert_close(exact[1], alone, rtol=0, atol=1e-12)
    # Five rounds, each of which multiplies an error by 3.4 at most: 3.4^5 * 6e-8 * sqrt(300).
    assert (orthogonalised(stack, torch.float32) - exact).abs().max() < 5e-4
    # Singular values of a random matrix come out between 0.5 and 1.5 (Jordan, 2024).
    assert torch.linalg.svdvals(exact).max() < 1.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_updated_like_its_matrices(dtype):
    stack = nn.Parameter(torch.randn(3, 32, 64))
    apart = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    before = stack.detach().clone()
    optimizers = [Muon(each, lr=1e-2, dtype=dtype) for each in ([stack], apart)]
    for _ in range(3):
        stack.grad = torch.randn(stack.shape)
        for matrix, gradient in zip(apart, stack.grad, strict=True):
            matrix.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    moved = (stack - before).abs().max()
    # Batched products round elsewhere than single ones: in bfloat16 2^-8 a factor, five rounds of
    # three products.
    share = 0.1 if dtype == torch.bfloat16 else 1e-4
    assert (stack - torch.stack(list(apart))).abs().max() < share * moved


def test_matrices_in_bf16_get_the_steps_of_torchs_muon():
    ours, theirs = nn.Parameter(torch.randn(48, 32)), nn.Parameter(torch.empty(48, 32))
    theirs.data.copy_(ours.data)
    pair = (
        Muon([ours], lr=1e-2, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(5):
        ours.grad = torch.randn(48, 32)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
        assert torch.equal(ours, theirs)
    assert torch.equal(*(each.state_dict()["state"][0]["momentum_buffer"] for each in pair))


def test_muon_takes_matrices_and_stacks_only():
    with pytest.raises(ConfigError, match=r"shape \(3,\): Muon takes matrices"):
        Muon([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize(("features", "wanted"), [(ZEN4, torch.bfloat16), (AVX2, torch.float32)])
def test_a_joint_optimizer_orthogonalises_in_what_the_cpu_multiplies(cpu, features, wanted):
    cpu(features)
    model = bare("llama")
    chosen, given = JointOptimizer(model, lr=1e-3), JointOptimizer(model, lr=1e-3, precision="fp32")
    assert dtype_of(chosen.optimizers.each["muon"]) == wanted
    assert dtype_of(given.optimizers.each["muon"]) == torch.float32
    # Kept in the state, as Trainer saves it: going on elsewhere changes nothing.
    given.load_state_dict(copy.deepcopy(chosen.state_dict()))
    assert dtype_of(given.optimizers.each["muon"]) == wanted
    assert dtype_of(copy.deepcopy(chosen.optimizers.each["muon"])) == wanted


def test_a_run_says_its_precision_and_keeps_it_on_another_kind_of_machine(cpu, parts, tmp_path):  # noqa: F811
    cpu(ZEN4)
    first = start(parts, tmp_path)
    assert (first.config.precision, first.precision.name) == ("bf16", "bf16")
    assert {dtype_of(each) for each in muons(first)} == {torch.bfloat16}
    for _ in range(3):
        first.step()
    first.close()
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["train"]["precision"] == "bf16"
    assert written["starts"][0]["precision"] == "bf16 (this CPU has avx512_bf16)"

    cpu(AVX2, "AVX2")
    again = start(parts, tmp_path)
    assert again.step_number == 3 and again.precision.name == "bf16"
    assert str(again.precision) == "bf16 (as this run began)"
    again.close()
    with pytest.raises(MismatchError, match="precision"):
        start(parts, tmp_path, config=TrainConfig(**{**vars(CONFIG), "precision": "fp32"}))
    fresh = start(parts, tmp_path / "new")
    assert fresh.precision.name == "fp32" and fresh.precision.autocast is None
    assert {dtype_of(each) for each in muons(fresh)} == {torch.float32}
    finish(fresh)
    fresh.close()


def dtype_of(optimizer: Muon) -> torch.dtype:
    return optimizer.param_groups[0]["dtype"]


def muons(run) -> list[Muon]:
    return [run.optimizers.each[name] for name in ("muon", "stacked_muon")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_is_opened_in_what_the_cpu_multiplies_and_says_so(cpu, tmp_path, capsys, dtype):
    sizes = {"vocab_size": len(corpus.tokenizer()), "pad_token_id": None}
    bare("llama", **sizes).to(dtype).save_pretrained(tmp_path)
    cpu({**AMX, "amx_fp16": True})
    assert open_model(tmp_path, {}).dtype == dtype and "opened" not in capsys.readouterr().err
    cpu(AVX2, "AVX2")
    opened = open_model(tmp_path, {})
    assert opened.dtype == torch.float32
    assert f"opened as float32, in which its {dtype} weights have the same values" in (
        capsys.readouterr().err
    )


def test_arms_that_began_in_two_precisions_are_not_compared(tmp_path, monkeypatch):
    config = TrainConfig(tokens=1_024, batch=2, checkpoint_every=1)
    ids = corpus.tokens("train", config.tokens + 1).ids
    for preset_name, begun in (("nano-moe", "bf16"), ("nano-engram", "fp32")):
        with monkeypatch.context() as patch:
            patch.setattr(demo_study, "ARMS", {preset_name: preset_name})
            begins = replace(config, precision=begun)
            (run,) = demo_study.make_runs(begins, tmp_path, ids, ids[:300]).values()
        run.step()
        run.close()
    with pytest.raises(MismatchError, match="one arm began in bf16, the other in fp32"):
        demo_study.demo(config, tmp_path, Console(quiet=True), "engram demo")


def test_tables_stay_as_they_are_stored_and_weights_tell_where_config_json_does_not(
    cpu, canonical, tmp_path, capsys
):
    small_model(canonical).to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checksums.json").unlink()
    cpu(AVX2, "AVX2")
    opened = open_model(tmp_path, {})
    assert "opened as float32" in capsys.readouterr().err
    assert opened.dtype == torch.float32
    assert {table.weight.dtype for table in opened.model.tables.values()} == {torch.bfloat16}
    cpu(ZEN4)
    assert open_model(tmp_path, {}).dtype == torch.bfloat16
