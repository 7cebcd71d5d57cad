"""Released checkpoints in fp8: every scale is used as transformers uses it, or refused by name."""

import json
from pathlib import Path

import pytest
import torch
from kits import DEEPSEEK, FP8, PLE, QWEN, TABLE, quantised, read_all, stored, written
from safetensors.torch import load_file, save_file
from test_qwen4_exp import theirs
from transformers import Qwen4ExpForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Embedding

from engram_lm.cli import main
from engram_lm.errors import EngramError, MismatchError
from engram_lm.store.disk import Disk
from engram_lm.store.packed import Packed
from engram_lm.store.released import Released

ENGRAM = "layers.1.engram."


@pytest.fixture
def checkpoint(tmp_path):
    return lambda changes, family=QWEN, name="given": written(tmp_path / name, changes, family)


def embedded(changes: dict, rows_M: torch.Tensor) -> torch.Tensor:
    """What transformers makes of the table."""
    parts = [part for name, part in changes.items() if part is not None and "_scale" not in name]
    weight = torch.cat([part.view(torch.uint8) for part in parts]).view(FP8)
    module = FP8Embedding(*weight.shape)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    scale = next(part for name, part in changes.items() if name.endswith("weight_scale"))
    module.weight_scale = torch.nn.Parameter(scale.reshape(1), requires_grad=False)
    return module(rows_M)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "scale",
    [
        torch.tensor([0.000199], dtype=torch.bfloat16),
        torch.tensor(0.0003, dtype=torch.bfloat16),
        torch.tensor([[1 / 448]]),
    ],
    ids=str,
)
def test_a_table_with_one_scale_is_transformers_own_everywhere(checkpoint, tmp_path, scale, whole):
    changes = {layer: quantised(layer, scale.clone(), whole) for layer in (1, 2)}
    directory = checkpoint(changes[1] | changes[2])
    released = Released(directory)
    out, back = tmp_path / "packed", tmp_path / "back"
    assert main(["pack", str(directory), "--out", str(out), "--json"]) == 0
    for layer in released.layers:
        path = out / f"table-{layer:05}.safetensors"
        assert main(["pack", "--verify", str(path), "--json"]) == 0
        packed = Packed.open(path)
        again = ["pack", str(path), "--out", str(back), "--layout=qwen4-exp", "--json"]
        assert main(again) == 0
        rows_M = torch.arange(released.memory.specification.table_rows(layer))
        wanted = embedded(changes[layer], rows_M)
        assert wanted.dtype == scale.dtype and len(wanted.unique()) > 200
        stores = [released.table(layer), released.table(layer, where="disk")]
        stores.append(Disk(packed.label.format, [[packed.region]]))
        for store in stores:
            with store:
                assert store.format.row_bytes == store.format.dim
                values = store.format.decode(store.gather(rows_M))
            assert values.dtype == wanted.dtype and torch.equal(values, wanted)
        returned = load_file(back / path.name)
        assert len(returned) == 2 and torch.equal(embedded(returned, rows_M), wanted)


def test_a_whole_model_that_transformers_opens_holds_the_same_values(tmp_path):
    """By its own configuration keys; on a CPU it dequantises projections as it loads them."""
    theirs().save_pretrained(tmp_path)
    path, scale = tmp_path / "model.safetensors", torch.tensor([0.0021], dtype=torch.bfloat16)
    tensors = load_file(path)
    for name, tensor in load_file(path).items():
        if ".shard_" in name:
            tensors[name] = (tensor / scale.float()).to(FP8)
            tensors[name.split("shard_")[0] + "weight_scale"] = scale.clone()
        elif name.endswith(("ple.key_proj.weight", "ple.value_proj.weight")):
            tensors[name] = (50 * tensor).to(FP8)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1) / 50
    save_file(tensors, path, {"format": "pt"})
    record = json.loads((tmp_path / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "modules_to_convert": ["ngram_embedding"]}
    record |= {"quantization_config": fp8, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(record))
    model, released = Qwen4ExpForCausalLM.from_pretrained(tmp_path), Released(tmp_path)
    for layer in released.layers:
        ple, table = model.model.layers[layer].ple, released.table(layer)
        embedding, rows_M = ple.ple_embedding.ngram_embedding, torch.arange(table.rows)
        assert type(embedding) is FP8Embedding
        values = table.format.decode(table.gather(rows_M))
        assert values.any() and torch.equal(values, embedding(rows_M))
        weights = torch.cat([ple.key_proj.weight, ple.value_proj.weight])
        assert torch.equal(released.fuse(layer, torch.bfloat16).kv.weight, weights)


def test_other_row_formats_are_made_from_the_scaled_values(checkpoint, tmp_path):
    changes = quantised(1, torch.tensor([0.000199], dtype=torch.bfloat16))
    options = ["--out", str(tmp_path / "bf16"), "--dtype=bf16", "--layers=1", "--json"]
    assert main(["pack", str(checkpoint(changes)), *options]) == 0
    rows = load_file(tmp_path / "bf16" / "table-00001.safetensors")["rows"]
    wanted = embedded(changes, torch.arange(len(rows)))
    assert torch.equal(rows.view(torch.bfloat16), wanted)


def configured(directory: Path, block: list[int]) -> Path:
    path = directory / "config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"quantization_config": {"weight_block_size": block}}))
    return directory


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale"])
@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        ("one", torch.float32),
        ("rows", torch.bfloat16),
        ("blocks", torch.float32),
        ("blocks", torch.float8_e8m0fnu),
    ],
    ids=str,
)
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
def test_fp8_projections_are_transformers_own(checkpoint, name, grid, dtype, into):
    changes, wanted = {}, []
    for part in ("key_proj", "value_proj"):
        weight = stored()[f"{PLE}{part}.weight"]
        rows, columns = weight.shape
        shape = {"one": (1, 1), "rows": (rows, 1), "blocks": (rows // 8, columns // 16)}[grid]
        scale = (torch.rand(shape) * 0.01 + 0.001).to(dtype)
        changes[f"{PLE}{part}.weight"] = fp8 = torch.randn(rows, columns).to(FP8)
        changes[f"{PLE}{part}.{name}"] = scale
        changes[f"{PLE}{part}.input_scale"] = torch.tensor(0.5)  # rounds what enters: not here
        wanted.append(Fp8Dequantize(None)._dequantize_one(fp8, scale, into))
    fuse = Released(configured(checkpoint(changes), [8, 16])).fuse(1, dtype=into)
    assert torch.equal(fuse.kv.weight, torch.cat(wanted))


def test_the_last_block_of_a_matrix_may_be_smaller(checkpoint):
    weight = stored()[f"{PLE}value_proj.weight"].float()
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // 24), -(-columns // 40)) + 0.5
    fp8 = weight.to(FP8)
    changes = {f"{PLE}value_proj.weight": fp8, f"{PLE}value_proj.weight_scale_inv": scale}
    fuse = Released(configured(checkpoint(changes), [24, 40])).fuse(1)
    row, column = torch.arange(rows)[:, None] // 24, torch.arange(columns) // 40
    assert torch.equal(fuse.kv.weight[-rows:], fp8.float() * scale[row, column])


ONE, HALF = torch.ones(1), torch.tensor([0.5], dtype=torch.bfloat16)


def fp8_of(name: str, family: str = QWEN) -> dict:
    return {name: stored(family)[name].float().to(FP8)}


REFUSED = [
    # beside a table
    (lambda: {f"{TABLE}weight_scale": HALF}, "weight_scale scales a table of BF16"),
    (lambda: quantised(1, HALF) | {f"{TABLE}weight_scale": None}, "no .*weight_scale"),
    (lambda: quantised(1, torch.ones(640, 1)), "weight_scale is F32 of shape"),
    (lambda: quantised(1, torch.ones(4)), "weight_scale is F32 of shape"),
    (lambda: quantised(1, HALF.half()), "weight_scale is F16"),
    (lambda: quantised(1, HALF * torch.inf), "weight_scale holds inf"),
    (lambda: quantised(1, -HALF), "weight_scale holds -0.5"),
    (lambda: quantised(1, HALF) | {f"{TABLE}shard_2.weight_scale": HALF}, "shard_2.weight_scale"),
    (lambda: quantised(1, HALF) | {f"{TABLE}weight_scale_inv": HALF}, "weight_scale_inv"),
    (lambda: {f"{TABLE}biases": ONE}, "ngram_embedding.biases"),
    (lambda: {f"{TABLE}input_scale": ONE}, "ngram_embedding.input_scale"),
    (lambda: {f"{TABLE}lora_A.weight": ONE}, "ngram_embedding.lora_A.weight"),
    (lambda: {f"{TABLE}shards.0.weight": ONE}, "ngram_embedding.shards.0.weight"),  # MLX
    (lambda: {f"{TABLE}shard_04.weight": ONE}, "ngram_embedding.shard_04.weight"),
    (lambda: {f"{TABLE}shard_1.weight": None}, "no tensor .*shard_1.weight, and there is shard_3"),
    (lambda: {f"{TABLE}weight": ONE}, "there twice, as weight and as shard_0"),
    (lambda: {f"mtp.{TABLE[6:]}shard_0.weight": ONE}, "shard_0.weight is there twice"),
    (lambda: {f"mtp.{TABLE[6:]}shard_4.weight": ONE}, "lies under 2 prefixes"),
    (
        lambda: {
            f"{TABLE}shard_{i}.weight": stored()[f"{TABLE}shard_0.weight"].char() for i in range(4)
        },
        "shard_0.weight: a table of I8",
    ),
    (lambda: {f"{PLE}ple_embedding.layer_multipliers": torch.arange(3)}, "layer_multipliers holds"),
    (lambda: {f"{PLE}ple_embedding.projection.weight": ONE}, "ple_embedding.projection.weight"),
    # beside a projection
    (lambda: fp8_of(f"{PLE}key_proj.weight"), "key_proj.weight is fp8 and has 0 scales"),
    (
        lambda: (
            fp8_of(f"{PLE}key_proj.weight")
            | {f"{PLE}key_proj.weight_scale": ONE, f"{PLE}key_proj.scale": ONE}
        ),
        "has 2 scales",
    ),
    (lambda: {f"{PLE}key_proj.weight_scale_inv": ONE}, "weight_scale_inv scales a weight of torch"),
    (lambda: {f"{PLE}value_proj.activation_scale": ONE}, "activation_scale scales a weight"),
    (
        lambda: fp8_of(f"{PLE}key_proj.weight") | {f"{PLE}key_proj.weight_scale": torch.ones(2, 3)},
        "key_proj.weight_scale: scales of shape",
    ),
    (
        lambda: fp8_of(f"{PLE}key_proj.weight") | {f"{PLE}key_proj.weight_scale": ONE / 0},
        "key_proj.weight_scale: a scale is not finite",
    ),
    (
        lambda: fp8_of(f"{PLE}key_proj.weight") | {f"{PLE}key_proj.weight_scale": ONE.int()},
        "key_proj.weight_scale: scales of shape",
    ),
    (
        lambda: {f"{PLE}value_proj.weight": stored()[f"{PLE}value_proj.weight"].char()},
        "value_proj.weight is torch.int8",
    ),
    (lambda: {f"{PLE}value_proj.weight_packed": ONE}, "value_proj.weight_packed"),
    (lambda: {f"{PLE}value_proj.weight_zero_point": ONE}, "value_proj.weight_zero_point"),
    (lambda: {f"{PLE}key_proj.g_idx": ONE}, "key_proj.g_idx"),
    (lambda: {f"{PLE}key_proj.bias": ONE}, "key_proj.bias"),
    (lambda: {f"{PLE}conv1d.bias": ONE}, "conv1d.bias"),
    (lambda: {f"{PLE}norm_value.weight": ONE}, "norm_value.weight"),
    (lambda: fp8_of(f"{PLE}norm_key.weight"), "norm_key.weight is torch.float8"),
    (
        lambda: {f"{PLE}key_proj.weight": stored()[f"{PLE}key_proj.weight"].T.contiguous()},
        "key_proj has shape",
    ),
    (
        lambda: {f"{PLE}conv1d.weight": stored()[f"{PLE}conv1d.weight"].mT.contiguous()},
        "conv.weight is stored with shape",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_cannot_be_used_is_refused_by_name(checkpoint, changes, message):
    with pytest.raises(EngramError, match=message) as error:
        read_all(checkpoint(changes()))
    assert "\n" not in str(error.value)


def wkv() -> dict[str, torch.Tensor]:
    return {"weight": stored(DEEPSEEK)[f"{ENGRAM}wkv.weight"]}


REFUSED_DEEPSEEK = [
    (lambda: {f"{ENGRAM}wkv.scale": None}, "wkv.weight is fp8 and has 0 scales"),
    (lambda: {f"{ENGRAM}wkv.weight": wkv()["weight"].bfloat16()}, "wkv.scale scales a weight of"),
    (lambda: {f"{ENGRAM}wkv.weight": wkv()["weight"].to(torch.float8_e5m2)}, "wkv.scale scales a"),
    (lambda: {f"{ENGRAM}wkv.scale": torch.ones(1, 1)}, "wkv.scale: scales of shape"),
    (lambda: {f"{ENGRAM}wkv.weight_scale_inv": ONE}, "wkv.weight_scale_inv lies in the memory"),
    (lambda: {f"{ENGRAM}embed.weight_scale": HALF}, "embed.weight_scale lies in the memory"),
    (lambda: {f"{ENGRAM}embed.scale": None}, "no tensor layers.1.engram.embed.scale"),
    (lambda: {f"{ENGRAM}q_weight": torch.ones(4, 64).char()}, "q_weight is torch.int8"),
    (lambda: {f"model.{ENGRAM}v_weight": ONE}, "v_weight lies in the memory"),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED_DEEPSEEK, ids=[message for _, message in REFUSED_DEEPSEEK]
)
def test_what_deepseek_does_not_name_is_refused_by_name(checkpoint, changes, message):
    with pytest.raises(EngramError, match=message):
        read_all(checkpoint(changes(), DEEPSEEK))


def test_pack_reads_no_table_whose_projections_cannot_be_read(checkpoint, tmp_path, capsys):
    """Its rows would be right and the memory of which they are a part would not."""
    directory = checkpoint({f"{PLE}ple_embedding.layer_multipliers": torch.arange(3)})
    assert main(["pack", str(directory), "--out", str(tmp_path / "out")]) == 2
    assert "layer_multipliers holds [0, 1, 2]" in capsys.readouterr().err


def test_scales_of_blocks_that_nobody_gave_a_size_are_of_128(checkpoint):
    changes = fp8_of(f"{PLE}key_proj.weight") | {
        f"{PLE}key_proj.weight_scale_inv": torch.ones(4, 4)
    }
    with pytest.raises(MismatchError, match=r"needed for blocks of \(128, 128\)"):
        read_all(checkpoint(changes))
    for number, wrong in enumerate(([128], [0, 128], "128")):
        with pytest.raises(MismatchError, match="weight_block_size="):
            read_all(configured(checkpoint({}, name=str(number)), wrong))
