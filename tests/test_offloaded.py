"""Tables, and all the rest, that accelerate keeps in memory or on disk: equal bits, rows alone."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from families import attached, bare, memory, speak
from tiny import VOCABULARY, canonical_map, tiny_model
from transformers import AutoModelForCausalLM

import engram_lm
from engram_lm import Table
from engram_lm.errors import ConfigError
from engram_lm.memory import offload
from engram_lm.memory.offload import held

IDS = torch.randint(2, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(9))
MODELS = {"llama": lambda: attached("llama"), "ours": lambda: tiny_model(streams=4)}


def logits(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def text(model) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=1)


def opened(directory: Path, **options):
    aside = directory / "aside"
    return AutoModelForCausalLM.from_pretrained(directory, offload_folder=aside, **options)


def under_pressure(directory: Path):
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return opened(directory, device_map="auto", max_memory={"cpu": size // 3})


def apart(directory: Path, part: str, **options):
    """Everything on the CPU, but a part of the decoder on disk."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    places = {name.rpartition(".")[0]: "cpu" for name in tensors if f".{part}." not in name}
    places |= {"lm_head": "cpu", f"model.{part}": "disk"}
    return opened(directory, device_map=places, **options)


WAYS = {
    "auto": under_pressure,
    "disk": lambda path: opened(path, device_map={"": "disk"}),
    "tables on disk": lambda path: apart(path, "tables"),
    "one table on disk": lambda path: apart(path, "tables.0"),
    "buffers too": lambda path: opened(path, device_map={"": "disk"}, offload_buffers=True),
    "cpu_offload": lambda path: cpu_offload(opened(path), "cpu", offload_buffers=True),
    "disk_offload": lambda path: disk_offload(opened(path), path / "there", "cpu"),
    "dispatched": lambda path: dispatch_model(
        opened(path), {"": "cpu", "model.tables": "disk"}, offload_dir=path / "there"
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_an_offloaded_model_says_what_it_says_in_memory(kind, tmp_path):
    model = MODELS[kind]()
    wanted, words = logits(model), text(model)
    model.save_pretrained(tmp_path)
    for way, offloads in WAYS.items():
        other = offloads(tmp_path)
        tables = other.model.tables
        assert tables["0"].weight.is_meta, way
        assert tables["2"].weight.is_meta == (way != "one table on disk"), way
        assert torch.equal(logits(other), wanted), way
        assert other.model.seal.digest == model.model.seal.digest is not None, way
        if way in ("auto", "cpu_offload"):
            assert torch.equal(text(other), words), way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offloaded_rows_are_of_the_dtype_that_the_model_was_opened_in(dtype, tmp_path):
    attached("llama").save_pretrained(tmp_path)
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    assert torch.equal(logits(opened(tmp_path, dtype=dtype, device_map={"": "disk"})), wanted)
    there = disk_offload(opened(tmp_path, dtype=dtype), tmp_path / "there", "cpu")
    assert torch.equal(logits(there), wanted)


def test_rows_are_read_from_a_map_of_the_file_and_the_table_is_never_brought(tmp_path, monkeypatch):
    table = Table(1000, 8)
    rows_M = torch.tensor([7, 999, 7, 0])
    wanted = table.gather(rows_M)
    disk_offload(torch.nn.ModuleDict({"table": table}), tmp_path, "cpu")
    taken = []

    def watched(module, name):
        taken.append(held(module, name))
        return taken[-1]

    monkeypatch.setattr("engram_lm.memory.table.held", watched)
    assert torch.equal(table.gather(rows_M), wanted)
    assert table.weight.is_meta
    # The tensor is the file: what is written there is seen through it.
    with (tmp_path / "table.weight.dat").open("r+b") as file:
        file.write(bytes(32))
    assert not taken[0][0].any() and taken[0].shape == (1000, 8)
    assert offload.computes_on(table) == offload.stays_on(table) == torch.device("cpu")


@pytest.mark.parametrize("way", ["disk", "cpu_offload"])
def test_a_table_that_is_offloaded_is_not_trained(way, tmp_path):
    attached("llama").save_pretrained(tmp_path)
    model = WAYS[way](tmp_path)
    with pytest.raises(ConfigError, match="a table is offloaded .* and cannot be trained"):
        model(IDS, labels=IDS).loss.backward()
    for table in model.model.tables.values():
        table.requires_grad_(False)
    model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("way", ["disk", "cpu_offload"])
def test_an_offloaded_backbone_is_given_memory_and_packs(way, tmp_path):
    whole, plain = attached("llama"), bare("llama")
    engram_lm.save_pack(whole, tmp_path / "pack")
    plain.save_pretrained(tmp_path / "bare")
    model = WAYS[way](tmp_path / "bare")
    engram_lm.attach(model, None, None)
    model.load_pack("one", tmp_path / "pack")
    assert torch.equal(logits(model, packs="one"), logits(whole))
    model = engram_lm.detach(model)
    engram_lm.attach(model, canonical_map(), memory())
    assert torch.equal(logits(model), logits(plain))
    speak(model)
    assert not torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(engram_lm.detach(model)), logits(plain))


def test_an_offloaded_memory_is_saved_whole_and_as_a_pack(tmp_path):
    model = attached("llama")
    model.save_pretrained(tmp_path / "model")
    engram_lm.save_pack(model, tmp_path / "pack")
    other = WAYS["disk"](tmp_path / "model")
    engram_lm.save_pack(other, tmp_path / "again")
    packs = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("pack", "again")]
    assert packs[0] == packs[1]
    with pytest.warns(UserWarning, match="save a model with offloaded modules"):
        other.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(opened(tmp_path / "saved")), logits(model))
