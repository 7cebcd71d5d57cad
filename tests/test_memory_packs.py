"""Several memories on one backbone: saved apart, chosen request by request, stacked, on disk."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import attached, bare, memory, speak
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import canonical_map, phrases
from transformers import DynamicCache, StaticCache

import engram_lm
from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.lookup import Memory
from engram_lm.model import checksums, memory_pack

# float32 through four layers: sums of a batch are taken in another order than those of one text.
TOLERANCE = 1e-4
T, NEW = 21, 10
FAMILIES = ["llama", "gpt_neox", "mistral", "qwen3_next"]
LAW_KV = "layers.0.engram.kv.weight"
CHOICES = ["law", None, ("law", "code"), "code", ("code", "law")]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return phrases(5, T, seed=4)


def code_memory():
    """Other layers, orders, heads and width than the first one, and no convolution."""
    base = memory(conv=False)
    other = replace(base.specification, layers=(1, 2), rows_per_head=(40, 40, 40), heads=1, seed=3)
    return replace(base, specification=other, head_dim=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of two packs for each family."""

    def save(family: str, name: str):
        directory = tmp_path_factory.mktemp(f"{family}-{name}")
        model = bare(family)
        torch.manual_seed(len(name))
        engram_lm.attach(model, canonical_map(), memory() if name == "law" else code_memory())
        speak(model)
        engram_lm.save_pack(model, directory)
        return model, directory

    return {(family, name): save(family, name) for family in FAMILIES for name in ("law", "code")}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family, saved):
    made = engram_lm.attach(bare(family), None, None)
    for name in ("law", "code"):
        made.load_pack(name, saved[family, name][1])
    return made


def logits(model, ids, **options) -> torch.Tensor:
    return model(ids, use_cache=False, **options).logits


@pytest.fixture
def reads(monkeypatch) -> list[torch.Tensor]:
    """Row numbers of every request, as (specification, numbers)."""
    seen: list = []
    plain = Memory.start_window

    def start_window(self, window):
        pending = plain(self, window)
        seen.append((self.addresses.specification.digest, pending.rows_LBTH))
        return pending

    monkeypatch.setattr(Memory, "start_window", start_window)
    return seen


def test_a_pack_says_what_the_model_says_that_it_was_saved_from(family, model, saved, ids):
    for name in ("law", "code"):
        assert torch.equal(logits(model, ids, packs=name), logits(saved[family, name][0], ids))
    assert torch.equal(logits(model, ids), logits(bare(family), ids))
    assert torch.equal(logits(model, ids, packs=[None] * 5), logits(bare(family), ids))


def left_padded(ids):
    lengths = [T, 3, 14, 9, 18]
    batch, mask = torch.ones_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        batch[row, T - length :], mask[row, T - length :] = ids[row, :length], 1
    return lengths, batch, mask, (mask.cumsum(1) - 1).clamp_min(0)


def test_requests_with_different_packs_in_a_batch_equal_the_requests_alone(model, ids, reads):
    lengths, batch, mask, positions = left_padded(ids)
    together = logits(model, batch, attention_mask=mask, position_ids=positions, packs=CHOICES)
    of_batch = reads[:]
    for row, length in enumerate(lengths):
        reads.clear()
        alone = logits(model, ids[row : row + 1, :length], packs=[CHOICES[row]])
        assert (together[row, T - length :] - alone[0]).abs().max() < TOLERANCE
        for digest, rows in reads:
            (whole,) = [numbers for other, numbers in of_batch if other == digest]
            readers = [c for c in range(5) if _reads(CHOICES[c], digest, model)]
            assert torch.equal(whole[:, readers.index(row), T - length :], rows[:, 0])
    different = logits(model, batch, attention_mask=mask, position_ids=positions)
    for row, choice in enumerate(CHOICES):
        changed = (together[row, -1] - different[row, -1]).abs().max()
        assert changed > 0.01 if choice else changed < TOLERANCE
    turned = [choice[::-1] if isinstance(choice, tuple) else choice for choice in CHOICES]
    options = {"attention_mask": mask, "position_ids": positions, "packs": turned}
    assert torch.equal(together, logits(model, batch, **options))


def _reads(choice, digest, model) -> bool:
    names = {
        name
        for name, pack in model.base_model.packs.items()
        if pack.addresses.specification.digest == digest
    }
    return bool(names & set([choice] if isinstance(choice, str) else choice or ()))


def test_texts_of_a_mixed_batch_are_those_of_the_requests_alone(model, ids):
    lengths, batch, mask, _ = left_padded(ids)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1}
    together = model.generate(batch, attention_mask=mask, packs=CHOICES, **options)[:, T:]
    for row, length in enumerate(lengths):
        prompt = ids[row : row + 1, :length]
        given = {"attention_mask": torch.ones_like(prompt), "packs": [CHOICES[row]], **options}
        for cached in (True, False):
            alone = model.generate(prompt, use_cache=cached, **given)[:, length:]
            assert torch.equal(together[row : row + 1], alone)


def test_a_mixed_batch_in_chunks_and_beams_is_what_it_is_at_once(model, ids):
    cache, parts = DynamicCache(config=model.config), []
    for part in ids.split([8, 1, 1, 11], dim=1):
        parts.append(model(part, past_key_values=cache, use_cache=True, packs=CHOICES).logits)
    wanted = logits(model, ids, packs=CHOICES)
    assert (torch.cat(parts, dim=1) - wanted).abs().max() < TOLERANCE
    options = {"max_new_tokens": 6, "num_beams": 3, "pad_token_id": 1, "do_sample": False}
    options["attention_mask"] = torch.ones_like(ids)
    found = model.generate(ids, packs=CHOICES, **options)
    assert torch.equal(found, model.generate(ids, packs=CHOICES, use_cache=False, **options))


def test_assisted_texts_with_a_pack_are_the_greedy_ones(saved, ids):
    model = engram_lm.attach(bare("llama"), None, None)
    model.load_pack("law", saved["llama", "law"][1])
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1, "packs": ["law"]}
    options["attention_mask"] = torch.ones_like(ids[:1])
    wanted = model.generate(ids[:1], use_cache=False, **options)
    assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=4, **options), wanted)


def test_packs_stand_beside_a_memory_of_the_models_own_and_are_switched(saved, ids, tmp_path):
    model = attached("llama", conv=False)
    own = logits(model, ids)
    model.load_pack("law", saved["llama", "law"][1])
    assert torch.equal(logits(model, ids), own)
    model.use_packs("law")
    both = logits(model, ids)
    assert (both - own).abs().max() > 0.01
    assert torch.equal(both, logits(model, ids, packs="law"))
    assert torch.equal(logits(model, ids, packs=[None] * 5), own)
    with model.base_model.without_memory():
        assert torch.equal(logits(model, ids), logits(bare("llama"), ids))
    model.save_pretrained(tmp_path)
    opened = engram_lm.AttachedForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(opened, ids), own)
    model.use_packs()
    assert torch.equal(logits(model, ids), own)
    model.use_packs("law")
    model.drop_pack("law")
    assert torch.equal(logits(model, ids), own) and not model.base_model.packs
    engram_lm.detach(model)
    assert torch.equal(logits(model, ids), logits(bare("llama"), ids))


def test_rows_of_a_pack_may_stay_on_disk(saved, ids, monkeypatch):
    model = engram_lm.attach(bare("llama"), None, None)
    taken = set()

    @contextmanager
    def watched(*arguments):
        with safe_open(*arguments) as file:
            get = file.get_tensor
            yield SimpleNamespace(
                keys=file.keys, get_tensor=lambda key: taken.add(key.split(".")[0]) or get(key)
            )

    monkeypatch.setattr(memory_pack, "safe_open", watched)
    for name in ("law", "code"):
        model.load_pack(name, saved["llama", name][1], memory="disk", memory_budget="1MB")
    assert taken == {"layers", "seal"}  # no table, which may be larger than memory
    whole = engram_lm.attach(bare("llama"), None, None)
    for name in ("law", "code"):
        whole.load_pack(name, saved["llama", name][1])
    assert torch.equal(logits(model, ids, packs=CHOICES), logits(whole, ids, packs=CHOICES))
    assert all(not pack.tables for pack in model.base_model.packs.values())
    assert sum(m.asked for m in model.base_model.packs["law"].served.metrics().values()) > 0


def test_a_pack_is_small_and_whole_or_refused(saved, tmp_path):
    _, directory = saved["llama", "law"]
    assert sorted(path.name for path in directory.iterdir()) == [
        *("canonical_map.safetensors", "checksums.json", "config.json"),
        *("model.safetensors", "specification.json"),
    ]
    model = engram_lm.attach(bare("llama"), None, None)
    for file in ("model.safetensors", "config.json", "canonical_map.safetensors"):
        copy = tmp_path / file
        copy.mkdir()
        for path in directory.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        changed = bytearray((copy / file).read_bytes())
        changed[-3] ^= 1
        (copy / file).write_bytes(changed)
        with pytest.raises(DataError, match=file):
            model.load_pack("law", copy)
    with pytest.raises(MismatchError, match="model_type='llama', this one has 'gpt_neox'"):
        engram_lm.attach(bare("gpt_neox"), None, None).load_pack("law", directory)
    with pytest.raises(MismatchError, match="num_hidden_layers=4, this one has 3"):
        small = engram_lm.attach(bare("llama", num_hidden_layers=3), None, None)
        small.load_pack("law", directory)
    with pytest.raises(DataError, match="No such file"):
        model.load_pack("law", tmp_path / "nothing")
    (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError, match="of a 'llama', not of a 'engram_pack'"):
        model.load_pack("law", copy)
    with pytest.raises(ConfigError, match="no memory to save"):
        engram_lm.save_pack(model, tmp_path / "none")


@pytest.mark.parametrize("memory", [None, "disk"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"tables.0.weight_scale": torch.ones(1)}, "tables.0.weight_scale"),
        (lambda w: {LAW_KV: w[LAW_KV].to(torch.float8_e4m3fn)}, "kv.weight is torch.float8_e4m3fn"),
        (lambda w: {f"{LAW_KV}_scale": torch.ones(1)}, "also hold .*kv.weight_scale"),
        (lambda w: {LAW_KV: w[LAW_KV][:-1].clone()}, "size mismatch for .*kv.weight"),
        (lambda w: {LAW_KV: None}, "the weights lack .*kv.weight"),
    ],
    ids=["scale of a table", "fp8", "scale of a projection", "cut", "missing"],
)
def test_a_pack_that_somebody_quantised_is_refused_by_name(
    saved, tmp_path, memory, change, message
):
    """With checksums of what it is now."""
    directory = shutil.copytree(saved["llama", "law"][1], tmp_path / "pack")
    weights = load_file(directory / "model.safetensors")
    weights |= change(weights)
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, directory / "model.safetensors")
    checksums.write(directory)
    model = engram_lm.attach(bare("llama"), None, None)
    budget = None if memory is None else "1MB"
    with pytest.raises((DataError, MismatchError), match=message) as error:
        model.load_pack("law", directory, memory=memory, memory_budget=budget)
    assert "\n" not in str(error.value)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*Graph break:UserWarning")
def test_compiled_steps_with_packs_are_what_they_are_at_once(saved, ids):
    model = engram_lm.attach(bare("llama"), None, None)
    for name in ("law", "code"):
        model.load_pack(name, saved["llama", name][1])
    torch.compiler.reset()
    forward = torch.compile(model.forward, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=2 * T)
    found = []
    for begin, end in [(0, 9), *((at, at + 1) for at in range(9, 13))]:
        call = model.forward if begin == 0 else forward
        positions = torch.arange(begin, end)[None]
        options = {"past_key_values": cache, "position_ids": positions, "packs": CHOICES}
        found.append(call(ids[:, begin:end], **options).logits)
    torch.compiler.reset()
    whole = logits(model, ids[:, :13], packs=CHOICES)
    assert (torch.cat(found, dim=1) - whole).abs().max() < TOLERANCE


def test_info_knows_a_pack_and_what_is_wrong_with_it(saved, tmp_path, capsys):
    pack = shutil.copytree(saved["llama", "law"][1], tmp_path / "law")
    assert main(["info", str(pack), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weights = load_file(pack / "model.safetensors")
    assert found["model"]["architecture"] == "MemoryPack" and found["memory"]["layers"]
    assert found["model"]["parameters"] == sum(
        value.numel() for name, value in weights.items() if not name.startswith("seal.")
    )
    save_file({**weights, "tables.9.weight": torch.zeros(1)}, pack / "model.safetensors")
    assert main(["info", str(pack)]) == 1
    printed = capsys.readouterr().out
    assert "are recorded" in printed and "no place for these weights: tables.9.weight" in printed


def test_what_was_not_loaded_or_chosen_rightly_is_refused(saved, ids):
    model = engram_lm.attach(bare("llama"), None, None)
    for name in ("law", "code"):
        model.load_pack(name, saved["llama", name][1])
    for packs, words in (
        ("laws", "'laws' is not loaded; loaded are law, code"),
        (["law"], "1 choices for 5 sequences"),
    ):
        with pytest.raises(ConfigError, match=words):
            logits(model, ids, packs=packs)
        with pytest.raises(ConfigError, match=words):
            model.generate(ids, packs=packs, max_new_tokens=1)
    with pytest.raises(ConfigError, match="'law' is loaded already"):
        model.load_pack("law", saved["llama", "law"][1])
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, packs=CHOICES)
    with pytest.raises(MismatchError, match="begun with 'law' for other sequences"):
        model(ids, past_key_values=cache, use_cache=True, packs=["law"] * 5)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True, packs=["code"] * 5)
    model(ids, past_key_values=cache, use_cache=True)  # goes on without, and forgets
    with pytest.raises(MismatchError, match="begun without 'code'"):
        model(ids, past_key_values=cache, use_cache=True, packs=["code"] * 5)
