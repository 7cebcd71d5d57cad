"""Packed files: rows come through every layout, damage is found, and nothing stops for good."""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from table_files import trainable
from tiny import tiny_model

from engram_lm.cli import main
from engram_lm.errors import DataError, MismatchError
from engram_lm.memory.rows import DTYPES, RowFormat
from engram_lm.model import contents
from engram_lm.store import aside, packed
from engram_lm.store.aside import Aside
from engram_lm.store.header import read_header
from engram_lm.store.pack import pack
from engram_lm.store.packed import Packed
from engram_lm.store.released import Released
from engram_lm.store.source import open_sources

ROOT = Path(__file__).parents[1]
KITS = {name: ROOT / "conformance" / name for name in ("deepseek_v41", "qwen4_exp")}


def run(capsys, *arguments: object, status: int = 0) -> dict:
    assert main(["pack", *map(str, arguments), "--json"]) == status
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *arguments: object) -> str:
    assert main(["pack", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def worker(*arguments: object) -> object:
    command = [sys.executable, Path(__file__).parent / "pack_worker.py", *arguments]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def rows_of(path: Path) -> torch.Tensor:
    """By safetensors, which knows nothing of us."""
    return load_file(path)["rows"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, dict[int, torch.Tensor]]:
    directory = tmp_path_factory.mktemp("checkpoint")
    return directory, trainable(directory)


@pytest.fixture
def small_blocks(monkeypatch):
    """Some hundred blocks in a table of a few megabytes."""
    monkeypatch.setattr(packed, "BLOCK_BYTES", 2**13)


@pytest.mark.parametrize("family", KITS)
def test_released_rows_are_packed_bit_for_bit_and_come_back(capsys, tmp_path, family):
    released = Released(KITS[family])
    run(capsys, KITS[family], "--out", tmp_path)
    for layer in released.layers:
        path, resident = tmp_path / f"table-{layer:05}.safetensors", released.table(layer)
        assert torch.equal(rows_of(path), resident.bytes_VR)
        assert Packed.open(path).label.format == resident.format
        layout = released.family
        run(capsys, path, "--out", tmp_path / "back", f"--layout={layout}")
        back = load_file(tmp_path / "back" / path.name)
        theirs = {}
        for file in KITS[family].glob("model*.safetensors"):
            theirs |= load_file(file)
        if layout == "deepseek-v4.1":
            prefix = f"layers.{layer}.engram.embed."
            assert set(back) == {prefix + "weight", prefix + "scale"}
            for name, tensor in back.items():
                assert tensor.dtype == theirs[name].dtype
                assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8))
        else:
            (tensor,) = back.values()
            assert torch.equal(tensor.view(torch.uint8), resident.bytes_VR)
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.journal"))


def test_a_saved_models_tables_are_packed_and_come_back(capsys, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    run(capsys, tmp_path / "model", "--out", tmp_path / "packed")
    for layer, table in model.model.tables.items():
        path = tmp_path / "packed" / f"table-{int(layer):05}.safetensors"
        found = Packed.open(path, model.model.addresses.specification)
        assert torch.equal(found.label.format.decode(rows_of(path)), table.weight.detach())
        run(capsys, path, "--out", tmp_path / "back", "--layout=trainable")
        back = load_file(tmp_path / "back" / path.name)
        assert torch.equal(back[f"model.tables.{layer}.weight"], table.weight.detach())


def test_weights_of_another_specification_than_their_config_are_refused(capsys, tmp_path):
    trainable(tmp_path, 50, 8)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.seal.sha256"] = weights["model.seal.sha256"] ^ 1
    save_file(weights, tmp_path / "model.safetensors")
    assert "trained with the specification" in refused(capsys, tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model.tables.0.weight_scale": (1,)}, "model.tables.0.weight_scale lies beside a table"),
        ({"model.tables.2.lora_A": (1,)}, "model.tables.2.lora_A lies beside a table"),
        ({"tables.0.weight": (1,)}, "tables.0.weight is there twice, as model.tab"),
        ({"other.seal.sha256": (32,)}, "seal.sha256 is there twice"),
    ],
    ids=str,
)
def test_what_a_model_of_ours_does_not_hold_beside_its_tables_is_refused(
    capsys, tmp_path, more, message
):
    trainable(tmp_path, 50, 8)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {name: torch.ones(shape) for name, shape in more.items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert message in refused(capsys, tmp_path, "--out", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_table_of_ours_that_somebody_quantised_is_refused(capsys, tmp_path, dtype):
    trainable(tmp_path, 50, 8)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.tables.2.weight"] = weights["model.tables.2.weight"].to(dtype)
    save_file(weights, tmp_path / "model.safetensors")
    error = refused(capsys, tmp_path, "--out", tmp_path / "out")
    assert "table of layer 2 is" in error and "of F32, BF16 or F16" in error


def test_of_each_file_just_the_tensors_are_read_that_the_index_names_there(tmp_path):
    """An old copy of a table in a file that is kept for others is not one."""
    tables = trainable(tmp_path, 50, 8)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    save_file({**weights, "model.tables.0.weight": tables[0] + 1}, tmp_path / "z.safetensors")
    save_file({"model.tables.0.weight": tables[0]}, tmp_path / "a.safetensors")
    names = dict.fromkeys(weights, "z.safetensors") | {"model.tables.0.weight": "a.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    source, other = open_sources(tmp_path)
    assert torch.equal(source.read(0, source.rows).view(torch.float32), tables[0])
    assert torch.equal(other.read(0, other.rows).view(torch.float32), tables[2])
    names["model.tables.0.weight"], names["model.tables.2.weight"] = (
        "z.safetensors",
        "a.safetensors",
    )
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(DataError, match=r"no tensor model.tables.2.weight, which .* promises"):
        open_sources(tmp_path)
    # transformers would read this one, and the tables came from elsewhere.
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="are of two saves"):
        open_sources(tmp_path)
    assert any("are of two saves" in problem for problem in contents.read(tmp_path).problems)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_packed_as_its_format_encodes(checkpoint, capsys, tmp_path, name):
    directory, tables = checkpoint
    found = run(capsys, directory, "--out", tmp_path, f"--dtype={name}", "--layers=2")
    (entry,) = found["tables"]
    format = RowFormat.named(name, 32)
    assert (entry["dtype"], entry["row_bytes"]) == (name, format.row_bytes)
    path = tmp_path / "table-00002.safetensors"
    assert torch.equal(rows_of(path), format.encode(tables[2]))
    assert run(capsys, "--verify", path)["verify"][0]["damaged"] == []
    # From there to fp32 again, as a trainable table.
    run(capsys, path, "--out", tmp_path / "back", "--layout=trainable", "--dtype=fp32")
    back = load_file(tmp_path / "back" / path.name)["model.tables.2.weight"]
    assert torch.equal(back, format.decode(rows_of(path)).float())


def test_a_table_whose_shards_stand_in_several_files_is_read_in_order(tmp_path):
    shutil.copytree(KITS["qwen4_exp"], tmp_path / "kit")
    weights = load_file(tmp_path / "kit" / "model.safetensors")
    (tmp_path / "kit" / "model.safetensors").unlink()
    index = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(sorted(weights))}
    for file in set(index.values()):
        part = {name: weights[name] for name, home in index.items() if home == file}
        save_file(part, tmp_path / "kit" / file)
    (tmp_path / "kit" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    for whole, cut in zip(
        open_sources(KITS["qwen4_exp"]), open_sources(tmp_path / "kit"), strict=True
    ):
        assert len(cut.parts[0]) > 1
        assert torch.equal(cut.read(0, cut.rows), whole.read(0, whole.rows))
        assert torch.equal(cut.read(100, 417), whole.read(100, 417))


def test_any_flipped_byte_is_found_and_its_block_named(small_blocks, checkpoint, capsys, tmp_path):
    run(capsys, checkpoint[0], "--out", tmp_path, "--dtype=int8", "--layers=0")
    path = tmp_path / "table-00000.safetensors"
    whole, region = path.read_bytes(), Packed.open(path).region
    block_rows, draw = Packed.open(path).block_rows, random.Random(0)
    places = [draw.randrange(region.offset) for _ in range(150)]
    places += [draw.randrange(region.offset, region.end) for _ in range(60)]
    places += [0, 7, 8, region.offset - 1, region.offset, region.end - 1]
    for place in places:
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 1 << draw.randrange(8)]))
        if place < region.offset:
            with pytest.raises(DataError):
                Packed.open(path)
        else:
            (damage,) = Packed.open(path).damaged()
            row = (place - region.offset) // region.row_bytes
            assert damage.first <= row < damage.last <= damage.first + block_rows
            assert damage.block == row // block_rows
        with path.open("r+b") as file:
            file.seek(place)
            file.write(whole[place : place + 1])
    assert path.read_bytes() == whole
    with path.open("r+b") as file:
        file.seek(region.offset + 3 * region.row_bytes)
        file.write(b"\0\0\0\0")
    found = run(capsys, "--verify", path, status=1)["verify"][0]["damaged"]
    assert found == [{"block": 0, "first": 0, "last": block_rows}]
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    hashes = [run(capsys, "--verify", path, status=1)["verify"][0]]
    path.write_bytes(whole)
    hashes.append(run(capsys, "--verify", path)["verify"][0])
    recorded = read_header(path).metadata["header_sha256"]
    assert [each["recorded_sha256"] for each in hashes] == [recorded, recorded]
    assert hashes[0]["sha256"] != recorded == hashes[1]["sha256"]
    path.write_bytes(whole[: region.offset] + b"\0" * len(whole[region.offset :]))
    assert main(["pack", "--verify", str(path)]) == 1
    assert f"block 0: among rows 0 to {block_rows - 1}" in capsys.readouterr().out


def written(path: Path, changes: dict[str, str], **tensor: object) -> None:
    """A packed file again with other metadata, sealed anew: wrong in just these words."""
    header = read_header(path)
    offset = header.tensors["rows"].offset
    rows = path.read_bytes()[offset:]
    metadata = {**header.metadata, **changes, "header_sha256": "0" * 64}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    shape = list(header.tensors["rows"].shape)
    entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, len(rows)], **tensor}
    text = json.dumps({"__metadata__": metadata, "rows": entry}, separators=(",", ":")).encode()
    content = len(text).to_bytes(8, "little") + text
    if "header_sha256" in metadata:
        content = packed._sealed(content, packed.seal(content))
    path.write_bytes(content + rows)


ONE_SCALE = {"dtype": "fp8", "scale_group": "0"}
"""And so, of all its rows, tensor_scale."""


@pytest.mark.parametrize(
    ("changes", "tensor", "message"),
    [
        ({"format": "other"}, {}, "format='other': no packed table"),
        ({"version": "2"}, {}, "version='2': version '1' is read"),
        ({"layer": None}, {}, "metadata key 'layer'"),
        ({"more": "1"}, {}, "metadata key 'more'"),
        ({"layer": "1"}, {}, "layer=1: its specification has layers (0, 2)"),
        ({"layer": "-1"}, {}, "layer='-1': a whole number"),
        ({"layer": "2"}, {}, "rows are U8"),
        ({"dtype": "fp7"}, {}, "dtype='fp7': accepted are fp32"),
        ({"dtype": "fp8"}, {}, "scale_dtype='bf16': not that of fp8 rows"),
        ({"dtype": "int4"}, {}, "rows are U8"),
        ({"scale_dtype": "f16"}, {}, "scale_dtype='f16'"),
        ({"scale_group": "3"}, {}, "scale_group=3: must divide dim=8"),
        ({"scale_group": "0"}, {}, "int8 rows need scales"),
        ({"tensor_scale": "0.5"}, {}, "tensor_scale=0.5: only fp8 rows without scales"),
        ({"tensor_scale": "0.50"}, {}, "tensor_scale='0.50' of scale_dtype='bf16': the shortest"),
        ({"tensor_scale": "one"}, {}, "tensor_scale='one' of scale_dtype='bf16': the shortest"),
        ({"tensor_scale": "1.0", "scale_dtype": "none"}, {}, "of scale_dtype='none': the shortest"),
        ({**ONE_SCALE, "tensor_scale": "0.1"}, {}, "tensor_scale=0.1: a finite torch.bfloat16"),
        ({**ONE_SCALE, "tensor_scale": "nan"}, {}, "tensor_scale=nan: a finite torch.bfloat16"),
        ({**ONE_SCALE, "tensor_scale": "1.0", "scale_dtype": "ue8m0"}, {}, "bfloat16 or float32"),
        (ONE_SCALE, {}, "scale_dtype='bf16': not that of fp8 rows"),
        ({"dim": "16"}, {}, "rows are U8"),
        ({"dim": "8.0"}, {}, "dim='8.0': a whole number"),
        ({"block_rows": "1"}, {}, "for blocks of 1 rows"),
        ({"block_rows": "0"}, {}, "for blocks of 0 rows"),
        ({"block_sha256": "0"}, {}, "block_sha256 has 1 digits"),
        ({"specification": "{}"}, {}, "specification: not an engram-specification"),
        ({"specification": "["}, {}, "specification: "),
        ({"specification_sha256": "0" * 64}, {}, "not the recorded one"),
        ({}, {"dtype": "I8"}, "rows are I8"),
        ({}, {"shape": [1120]}, "rows are U8 (1120,)"),
    ],
    ids=str,
)
def test_a_file_that_contradicts_itself_is_one_line(tmp_path, changes, tensor, message):
    trainable(tmp_path, 50, 8)
    (source, _) = open_sources(tmp_path)
    path = tmp_path / "table.safetensors"
    pack(source, RowFormat.named("int8", 8), "packed", path)
    written(path, {})
    assert Packed.open(path).label.layer == 0  # sealed anew, it would do
    written(path, changes, **tensor)
    with pytest.raises(DataError) as error:
        Packed.open(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_overlong_unfinished_and_foreign_files_are_one_line(tmp_path):
    trainable(tmp_path, 50, 8)
    (source, _) = open_sources(tmp_path)
    path = tmp_path / "table.safetensors"
    pack(source, source.format, "packed", path)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "truncated"),
        (whole + b"\0", "overlong"),
        (whole[:5], "truncated"),
        (b"", "truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            Packed.open(path)
    label = packed.Label(specification=source.specification, layer=0, format=source.format)
    path.write_bytes(label.header() + whole[len(label.header()) :])
    with pytest.raises(DataError, match="is not what header_sha256='0000"):
        Packed.open(path)
    with pytest.raises(DataError, match="format=None: no packed table"):
        Packed.open(tmp_path / "model.safetensors")
    path.write_bytes(whole)
    other = replace(source.specification, seed=1)
    with pytest.raises(MismatchError, match=f"sha256 {source.specification.digest}, .*asked for"):
        Packed.open(path, other)


@pytest.mark.parametrize(
    ("name", "layout", "hot"),
    [("int4", "packed", 0), ("fp8", "deepseek-v4.1", 0), ("int4", "packed", 104)],
)
def test_killed_at_random_writes_it_goes_on_to_the_same_bytes(
    small_blocks, tmp_path, name, layout, hot
):
    trainable(tmp_path / "model", 2000, 256)
    kills = worker("killed", tmp_path / "model", tmp_path, name, layout, hot, 0, 1)
    assert min(kills) >= 2
    (source, _) = open_sources(tmp_path / "model")
    hot_K = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:hot] if hot else None
    whole = tmp_path / "whole.safetensors"
    pack(source, RowFormat.named(name, 256), layout, whole, hot_K=hot_K)
    for seed in range(2):
        content = (tmp_path / f"{seed}.safetensors").read_bytes()
        assert hashlib.sha256(content).digest() == hashlib.sha256(whole.read_bytes()).digest()
    assert not list(tmp_path.glob("*.partial"))


def test_memory_does_not_follow_the_size_of_the_table(tmp_path):
    """100 MB of rows that are read, in less than 48 MiB."""
    trainable(tmp_path / "model", 50_000, 256)
    found = worker("growth", tmp_path / "model", tmp_path / "packed", "int4")
    assert 0 <= found < 48 * 2**20


def test_a_full_disk_is_one_line_and_leaves_what_can_be_gone_on_with(
    small_blocks, checkpoint, capsys, tmp_path, monkeypatch
):
    write, room = os.pwrite, 200

    def full(file: int, content: bytes, offset: int) -> int:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    arguments = [checkpoint[0], "--out", tmp_path, "--layers=0"]
    assert "No space left on device; make room" in refused(capsys, *arguments, "--json")
    path = tmp_path / "table-00000.safetensors"
    assert not path.exists()
    assert aside.journal(path).exists()
    monkeypatch.setattr(os, "pwrite", write)
    run(capsys, *arguments)
    assert torch.equal(rows_of(path).view(torch.float32), checkpoint[1][0])
    assert run(capsys, "--verify", path)["verify"][0]["damaged"] == []


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    checkpoint, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    error = refused(capsys, checkpoint[0], "--out", tmp_path / "out", "--json")
    assert "bytes are needed, the disk has 1000 free" in error
    assert not list((tmp_path / "out").iterdir())


def test_what_another_source_left_is_not_gone_on_with(small_blocks, tmp_path, monkeypatch):
    trainable(tmp_path / "model", 5000, 32)
    (source, _) = open_sources(tmp_path / "model")
    path = tmp_path / "table.safetensors"
    monkeypatch.setattr(Aside, "finish", lambda self: self._give_up(OSError(5, "stopped")))
    with pytest.raises(DataError, match="stopped"):
        pack(source, source.format, "packed", path)
    monkeypatch.undo()
    monkeypatch.setattr(packed, "BLOCK_BYTES", 2**13)
    tables = trainable(tmp_path / "model", 5000, 32, seed=1)
    (source, _) = open_sources(tmp_path / "model")
    pack(source, source.format, "packed", path)
    assert torch.equal(rows_of(path).view(torch.float32), tables[0])


def test_a_finished_file_is_not_written_again_by_the_command_that_goes_on(
    checkpoint, capsys, tmp_path, monkeypatch
):
    """Killed at the second layer: the first one's file is whole and known to be."""
    sources = open_sources(checkpoint[0])
    path = tmp_path / "table-00000.safetensors"
    pack(sources[0], sources[0].format, "packed", path)
    before = path.stat()
    run(capsys, checkpoint[0], "--out", tmp_path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert torch.equal(
        rows_of(tmp_path / "table-00002.safetensors").view(torch.float32), checkpoint[1][2]
    )
    error = refused(capsys, checkpoint[0], "--out", tmp_path, "--json")
    assert "is there already; remove it" in error


def test_two_processes_do_not_write_one_file(checkpoint, tmp_path):
    (source, _) = open_sources(checkpoint[0])
    path = tmp_path / "table.safetensors"
    with Aside(path, 10, "other"), pytest.raises(DataError, match="another process is writing it"):
        pack(source, source.format, "packed", path)


def test_a_value_that_cannot_be_said_is_named_by_its_row(capsys, tmp_path):
    tables = trainable(tmp_path, 5000, 32)
    tables[0][4321, 3] = 1e6
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "model.tables.0.weight": tables[0]}, tmp_path / "model.safetensors")
    error = refused(capsys, tmp_path, "--out", tmp_path / "out", "--dtype=fp16", "--json")
    found = re.search(r"layer 0, from row (\d+) on: row (\d+) of .* which fp16 cannot say", error)
    assert int(found[1]) + int(found[2]) == 4321
    assert not (tmp_path / "out" / "table-00000.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=x"], "give a SOURCE and --out"),
        (["SOURCE"], "give a SOURCE and --out"),
        (["SOURCE", "--verify", "x"], "takes packed files and nothing else"),
        (["SOURCE", "--out=x", "--dtype=fp7"], "dtype='fp7': accepted are fp32"),
        (["SOURCE", "--out=x", "--layout=gguf"], "layout='gguf': accepted are packed"),
        (["SOURCE", "--out=x", "--layout=deepseek-v4.1"], "a deepseek-v4.1 table is fp8 with"),
        (["SOURCE", "--out=x", "--layout=trainable", "--dtype=fp16"], "is fp32 or bf16"),
        (["SOURCE", "--out=x", "--layout=qwen4-exp", "--dtype=int8"], "a qwen4-exp table is"),
        (["SOURCE", "--out=x", "--layers=1"], "--layers 1: the source has 0, 2"),
        (["nowhere", "--out=x"], "nowhere/config.json: No such file"),
        (["--verify", "nowhere"], "nowhere: No such file"),
        (["SOURCE", "--out=x", "--hot=0.1"], "--hot and --data: give both or neither"),
        (["SOURCE", "--out=x", "--data=x"], "--hot and --data: give both or neither"),
        (["--verify", "x", "--hot=0.1"], "takes packed files and nothing else"),
        (["SOURCE", "--out=x", "--hot=1.5", "--data=x"], "--hot 1.5: a share of the table's rows"),
        (["SOURCE", "--out=x", "--hot=7", "--data=x"], "--hot 7: a share of the table's rows"),
        (["SOURCE", "--out=x", "--hot=few", "--data=x"], "--hot few: a share of the table's"),
        (["SOURCE", "--out=x", "--hot=8", "--data=x"], "x: no index.json"),
        (["SOURCE", "--out=x", "--hot=8", "--data=x", "--layout=trainable"], "no place for hot"),
    ],
    ids=str,
)
def test_wrong_options_are_one_line(checkpoint, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(checkpoint[0]) if each == "SOURCE" else each for each in arguments]
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())
