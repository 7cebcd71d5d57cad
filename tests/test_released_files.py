"""Which file of a released checkpoint counts: one that an index names, or the only one there is."""

import json
import time
from pathlib import Path

import pytest
import torch
from kits import TABLE, quantised, read_all, stored, written
from safetensors.torch import save_file

from engram_lm.errors import DataError
from engram_lm.store.released import Released

ONE, HALF = torch.ones(1), torch.tensor([0.5], dtype=torch.bfloat16)


@pytest.fixture
def checkpoint(tmp_path):
    return lambda changes, name="given": written(tmp_path / name, changes)


def index(directory: Path, names: dict[str, str]) -> None:
    text = json.dumps({"weight_map": names})
    (directory / "model.safetensors.index.json").write_text(text)


def test_a_memory_in_a_layer_that_the_configuration_does_not_name_is_refused(checkpoint):
    name = "model.layers.7.ple.norm_query.weight"
    with pytest.raises(DataError, match=f"{name} is of a memory"):
        Released(checkpoint({name: torch.ones(4)})).fuse(1)


def test_files_that_hold_one_name_are_refused_unless_an_index_decides(checkpoint):
    """A stale shard beside the one file, or two shards: rows of the one or of the other."""
    directory = checkpoint({})
    name = f"{TABLE}shard_0.weight"
    rows = stored()[name]
    save_file({name: rows + 1}, directory / "model-00001-of-00002.safetensors")
    for _ in range(2):
        with pytest.raises(DataError, match=r"shard_0.weight is in .* and in .*no model.safetens"):
            read_all(directory)
        if (directory / "model.safetensors").exists():
            (directory / "model.safetensors").rename(directory / "one.safetensors")
    names = dict.fromkeys(stored(), "one.safetensors")
    for file, more in (("one.safetensors", 0), ("model-00001-of-00002.safetensors", 1)):
        index(directory, names | {name: file})
        with Released(directory).table(1, where="disk") as table:
            found = table.format.decode(table.gather(torch.arange(len(rows))))
        assert torch.equal(found, rows + more)
    # One file that the index leaves out is not read, whole or not.
    save_file({name: rows + 2}, directory / "model.safetensors")
    with Released(directory).table(1) as table:
        found = table.format.decode(table.gather(torch.arange(len(rows))))
    assert torch.equal(found, rows + 1)


def test_a_file_beside_that_holds_other_names_or_a_variant_is_nobodys_business(checkpoint):
    directory = checkpoint({})
    save_file({"a": ONE}, directory / "adapter_model.safetensors")
    save_file(stored(), directory / "model.fp16.safetensors")
    (directory / "half.safetensors").write_bytes(b"half")
    read_all(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' stands twice"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"names the file '../x.safetensors'"),
        ('{"weight_map": {"a": 5}}', "not an index of weights"),
        ('{"weight_map": []}', "not an index of weights"),
    ],
)
def test_an_index_that_decides_nothing_is_refused(checkpoint, text, message):
    directory = checkpoint({})
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_all(directory)


def test_what_an_index_promises_and_a_file_lacks_is_refused(checkpoint):
    for part in ("shard_3.weight", "weight_scale"):
        changes = quantised(1, HALF)
        del changes[f"{TABLE}{part}"]
        directory = checkpoint(
            changes | ({f"{TABLE}{part}": None} if "shard" in part else {}), name=part
        )
        names = dict.fromkeys([*stored(), f"{TABLE}weight_scale"], "model.safetensors")
        index(directory, names)
        with pytest.raises(DataError, match=part):
            Released(directory).parts(1)


def test_opening_as_many_names_as_are_released_takes_no_time(checkpoint):
    """152,089 names, and the table in 128 shards of as many files."""
    directory = checkpoint({})
    rows = torch.cat([stored()[f"{TABLE}shard_{i}.weight"] for i in range(4)])
    names = {name: "model.safetensors" for name in stored() if not name.startswith(TABLE)}
    for i, part in enumerate(rows.chunk(128)):
        name, file = f"{TABLE}shard_{i}.weight", f"part-{i}.safetensors"
        names[name] = file
        save_file({name: part.clone()}, directory / file)
    others = range(152_089 - len(names))
    names |= {f"model.layers.{i % 48}.mlp.{i}.weight": "x.safetensors" for i in others}
    index(directory, names)
    begun = time.process_time()
    released = Released(directory)
    table = released.table(1, where="disk")
    fuse = released.fuse(1)
    assert time.process_time() - begun < 2
    with table:
        assert len(table._files) == 128
        found = table.format.decode(table.gather(torch.arange(table.rows)))
    assert torch.equal(found, rows)
    assert fuse.kv.weight.isfinite().all()
