"""Released checkpoints load by their own names and give what the conformance kit says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engram_lm.cli import main as engram
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.lookup import Memory
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.rows import RowFormat
from engram_lm.store.released import Released, dequantize_blocks
from engram_lm.store.resident import Resident

KIT = Path(__file__).parents[1] / "conformance"
FAMILIES = ["deepseek_v41", "qwen4_exp"]


def cases() -> list[tuple[str, dict]]:
    expected = {f: json.loads((KIT / f / "expected.json").read_text()) for f in FAMILIES}
    return [(f, case) for f in FAMILIES for case in expected[f]["cases"]]


def mark(case: dict, key: str) -> torch.Tensor:
    mask = torch.zeros(1, len(case["token_ids"]), dtype=torch.bool)
    mask[0, case.get(key, [])] = True
    return mask


def memory_of(released: Released) -> Memory:
    addresses = Addresses(released.memory.specification, released.canonical_map())
    return Memory(addresses, {layer: released.table(layer) for layer in released.layers})


@pytest.fixture(scope="module")
def kits() -> dict:
    found = {}
    for family in FAMILIES:
        released = Released(KIT / family)
        tensors = load_file(KIT / family / "expected.safetensors")
        found[family] = released, memory_of(released), tensors
    return found


@pytest.mark.parametrize(
    ("family", "case"), cases(), ids=[f"{family}-{case['name']}" for family, case in cases()]
)
def test_rows_vectors_gates_and_updates_equal_the_kit(kits, family, case):
    released, memory, tensors = kits[family]
    masked = mark(case, "masked_positions")
    pending = memory.start(
        torch.tensor([case["token_ids"]]),
        torch.tensor([case.get("history", [])], dtype=torch.int64),
        masked=masked,
        document_starts=mark(case, "document_starts"),
    )
    for index, layer in enumerate(released.layers):
        assert pending.rows_LBTH[index, 0].tolist() == case["rows"][str(layer)]
        name = f"{case['name']}.layers.{layer}."
        vectors = pending.wait(layer)
        assert torch.equal(vectors[0].float(), tensors[name + "vectors"])  # fp8 and bf16 are exact
        gates, fuse = [], released.fuse(layer)
        fuse.gate.register_forward_hook(lambda _m, _i, gate, gates=gates: gates.append(gate))
        with torch.no_grad():
            hidden = tensors[name + "hidden"][None]
            update = fuse(hidden, vectors, pending.window, mask_BT=~masked).update_BTSD[0]
        open_T = ~masked[0]  # behind the gate an image token's mask is applied
        for ours, theirs in (
            (gates[0][0][open_T], tensors[name + "gate"][open_T]),
            (update, tensors[name + "update"]),
        ):
            # float32 against rounded float64, sums of up to 384 terms
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_constants_equal_the_kit(kits, family):
    released, memory, _ = kits[family]
    expected = json.loads((KIT / family / "expected.json").read_text())
    specification = memory.addresses.specification
    for layer in released.layers:
        assert [str(m) for m in specification.multipliers[layer]] == expected["multipliers"][
            str(layer)
        ]
        assert list(sum(specification.primes[layer], ())) == expected["primes"][str(layer)]
    if "canonical_map" in expected:
        assert memory.addresses.canonical.ids_V.tolist() == expected["canonical_map"]


def test_dequantised_blocks_equal_values_times_powers_of_two():
    weight = (torch.randn(70, 45) * 50).to(torch.float8_e4m3fn)  # no multiple of 32
    scale = torch.randint(110, 130, (3, 2), dtype=torch.uint8)
    found = dequantize_blocks(weight, scale, 32)
    for row, column in ((0, 0), (31, 31), (32, 0), (69, 44), (5, 32)):
        wanted = float(weight[row, column]) * 2.0 ** (int(scale[row // 32, column // 32]) - 127)
        assert float(found[row, column]) == wanted
    with pytest.raises(MismatchError, match=r"scales of shape \(2, 2\)"):
        dequantize_blocks(weight, scale[:2], 32)


@pytest.fixture
def copy(tmp_path):
    def of(family: str) -> Path:
        return Path(shutil.copytree(KIT / family, tmp_path / family))

    return of


def edit(directory: Path, change) -> None:
    path = directory / "config.json"
    record = json.loads(path.read_text())
    change(record.get("text_config", record))
    path.write_text(json.dumps(record))


def test_both_names_of_the_pad_key_are_read(copy):
    directory = copy("deepseek_v41")
    edit(directory, lambda text: text.update(engram_pad_id=text.pop("engram_pad_token_id")))
    assert Released(directory).memory == Released(KIT / "deepseek_v41").memory


def test_a_released_model_reads_ids_beyond_its_tokenizer(copy, capsys):
    expected = json.loads((KIT / "beyond_the_tokenizer.json").read_text())
    directory, case = copy(expected["checkpoint"]), expected["cases"][0]
    edit(directory, lambda text: text.update(vocab_size=expected["vocab_size"]))
    released = Released(directory)
    pending = memory_of(released).start(torch.tensor([case["token_ids"]]))
    for rows_TH, rows in zip(pending.rows_LBTH[:, 0].tolist(), case["rows"].values(), strict=True):
        assert rows_TH == rows
    ids = ",".join(map(str, case["token_ids"]))
    assert engram(["rows", "--spec", str(directory), "--ids", ids, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {k: each["table_rows"] for k, each in printed["layers"].items()} == case["rows"]
    assert printed["canonical_ids"] == case["canonical_ids"]


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("deepseek_v41", {"engram_num_embeddings": [1, 2]}, "the primes add up to"),
        ("deepseek_v41", {"engram_head_dim": None}, "engram_head_dim is missing"),
        ("deepseek_v41", {"engram_compressed_vocab_size": 7}, "engram_compressed_vocab_size is 7"),
        (
            "deepseek_v41",
            {"hidden_size": 32},
            "query_norm_weight has 256 values",
        ),
        ("qwen4_exp", {"seed": 5}, "layer_multipliers holds"),
        ("qwen4_exp", {"vocab_size": 401}, "layer_multipliers holds"),
        ("qwen4_exp", {"ngram_vocab_size_base": 100}, "ngram_heads_vocab_sizes holds"),
        ("qwen4_exp", {"ple_layer_ids": []}, "neither engram_layer_ids"),
        ("qwen4_exp", {"ple_layer_ids": [4]}, "config.json gives one to the layers"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_the_weights_is_refused(copy, family, change, message):
    directory = copy(family)
    edit(directory, lambda text: text.update(change))
    with pytest.raises((ConfigError, DataError, MismatchError), match=message):
        released = Released(directory)
        released.canonical_map()
        released.fuse(released.layers[0])


def test_a_table_of_another_size_is_refused(copy):
    directory = copy("qwen4_exp")
    edit(directory, lambda text: text.update(make_ngram_vocab_size_divisible_by=1000))
    with pytest.raises(MismatchError, match="the table has 640 rows of 16"):
        Released(directory).table(1)
    with pytest.raises(DataError, match="2 bytes a row"):
        Resident(torch.zeros(3, 4, dtype=torch.uint8), RowFormat(dtype=torch.bfloat16, dim=1))


def test_a_tensor_that_is_there_twice_is_refused_by_name(copy):
    directory = copy("qwen4_exp")
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.1.ple.norm_key.weight"
    weights["model.language_" + name] = weights[name].clone()
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(DataError, match="norm_key.weight is there twice"):
        Released(directory).fuse(1)


def test_missing_and_damaged_files_are_one_clear_line(copy, tmp_path):
    with pytest.raises(DataError, match="config.json: No such file"):
        Released(tmp_path)
    directory = copy("deepseek_v41")
    shard = directory / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match="no safetensors file can be read"):
        Released(directory).fuse(1)
    shard.unlink()
    with pytest.raises(DataError, match="model-00001"):
        Released(directory).table(1)
    with pytest.raises(ConfigError, match=r"layer=2: this memory has layers \(1, 14\)"):
        Released(directory).fuse(2)
    (directory / "config.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        Released(directory)
