"""A model given a memory, or other addresses for the one it has."""

import copy
import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny import VOCABULARY, canonical_map, phrases, tiny_config, tiny_model, trained_model

from engram_lm import corpus
from engram_lm.cli import main
from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.specification import Specification
from engram_lm.model import EngramLMForCausalLM, contents
from engram_lm.model.surgery import give_memory, readdress
from engram_lm.train.freeze import freeze
from engram_lm.train.journal import read_metrics
from engram_lm.train.optimizers import Optimizers, groups

IDS = torch.randint(2, VOCABULARY, (3, 29), generator=torch.Generator().manual_seed(3))


def memory_of(*args, **kwargs):
    return tiny_config(*args, **kwargs).memory_config


def logits(model, ids=IDS, autocast=None):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", [True, False], ids=["conv", "noconv"])
@pytest.mark.parametrize("streams", [1, 4])
def test_a_model_given_a_memory_has_the_same_logits_bit_for_bit(streams, conv, dtype, bias):
    model = tiny_model(streams, memory=None).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memory = memory_of(streams, conv)
    memory = replace(memory, fusion=replace(memory.fusion, bias=bias))
    given = give_memory(model, memory, canonical_map())
    assert given.model.reads_memory and not model.model.reads_memory
    assert all(table.weight.abs().min() > 0 for table in given.model.tables.values())
    assert torch.equal(logits(given), logits(model))
    assert torch.equal(logits(given, autocast=True), logits(model, autocast=True))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {p.dtype for p in given.parameters()} == {dtype}


def test_a_given_memory_speaks_once_its_value_projection_does():
    # The test above could not fail if the memory were never read.
    model = tiny_model(memory=None)
    given = give_memory(model, memory_of(), canonical_map())
    with torch.no_grad():
        given.model.layers[0].engram.kv.weight[-1] = 1
    assert not torch.equal(logits(given), logits(model))


def test_the_backbone_is_shared_and_its_parameters_keep_their_order():
    model = tiny_model(4, memory=None)
    given = give_memory(model, memory_of(), canonical_map())
    assert given.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert given.lm_head.weight is given.model.embed_tokens.weight
    plain = EngramLMForCausalLM(given.config)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in given.named_parameters()] == names
    assert [name for name, _ in given.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert not any(p.is_meta for p in (*given.parameters(), *given.buffers()))


def test_gradients_reach_the_value_projection_first_and_the_rows_after_one_step():
    model = trained_model(memory=None)
    given = give_memory(copy.deepcopy(model), memory_of(), canonical_map()).train()
    optimizers = Optimizers(given, lr=3e-3, table_lr_multiplier=5, weight_decay=0.0)
    table, fuse = given.model.tables["0"], given.model.layers[0].engram
    rows = [table.weight.detach().clone()]
    losses = []
    for step in range(30):
        ids = phrases(8, 40, seed=step)
        loss = given(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            assert fuse.kv.weight.grad[-fuse.width :].any()
            assert not fuse.kv.weight.grad[: -fuse.width].any()
            assert not table.row_gradient.values_UE.any()
        optimizers.clip(1.0)
        optimizers.step()
        optimizers.zero_grad()
        rows.append(table.weight.detach().clone())
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])
    touched = (rows[0] != rows[-1]).any(dim=1).float().mean()
    assert touched > 0.5
    # The same steps without the memory: what it adds is the memory's doing.
    alone = copy.deepcopy(model).train()
    optimizers = Optimizers(alone, lr=3e-3, table_lr_multiplier=5, weight_decay=0.0)
    for step in range(30):
        ids = phrases(8, 40, seed=step)
        last = alone(ids, labels=ids, use_cache=False).loss
        last.backward()
        optimizers.clip(1.0)
        optimizers.step()
        optimizers.zero_grad()
    assert losses[-1] < losses[0] and losses[-1] < last.item() - 0.02


def test_a_model_given_a_memory_is_saved_and_opened_whole(tmp_path):
    tokenizer = corpus.tokenizer()
    torch.manual_seed(0)
    config = tiny_config(memory=None, vocab_size=8192)
    model = EngramLMForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened = EngramLMForCausalLM.from_pretrained(tmp_path)
    given = give_memory(opened, memory_of(), tmp_path)
    given.save_pretrained(tmp_path)
    found = contents.read(tmp_path)
    assert found.whole and found.tokenizer == "beside it"
    digest = given.config.memory_config.specification.digest
    assert found.memory["specification_sha256"] == digest == given.model.seal.digest
    again = EngramLMForCausalLM.from_pretrained(tmp_path, tokenizer=tokenizer)
    assert torch.equal(logits(again), logits(model))
    assert "conditional memory" in (tmp_path / "README.md").read_text()


def test_what_cannot_be_given_is_refused_in_one_line():
    plain = tiny_model(memory=None)
    with pytest.raises(ConfigError, match="has a memory already"):
        give_memory(tiny_model(), memory_of(), canonical_map())
    far = memory_of()
    far = replace(far, specification=replace(far.specification, layers=(1, 7)))
    with pytest.raises(ConfigError, match=r"memory layers \(1, 7\): the model has layers 0 to 2"):
        give_memory(plain, far, canonical_map())
    with pytest.raises(MismatchError, match="has 98 ids, vocab_size is 97"):
        give_memory(plain, memory_of(), CanonicalMap.identity(98))
    bound = replace(memory_of(), specification=memory_of().specification.bind(canonical_map(1)))
    with pytest.raises(MismatchError, match="canonical map is not the specification's"):
        give_memory(plain, bound, canonical_map())
    with pytest.raises(ConfigError, match="gives a model its first one"):
        readdress(plain, memory_of().specification)
    with pytest.raises(DataError, match="a fast tokenizer"):
        give_memory(plain, memory_of(), object())
    assert plain.config.memory is None


def rules(model, **changes):
    return replace(model.config.memory_config.specification, **changes)


BIG = {"rows_per_head": (100_003, 100_003)}


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("change", [BIG, {**BIG, "seed": 5}], ids=["grown", "reseeded"])
def test_rows_go_along_with_their_n_grams(streams, change):
    model = trained_model(streams)
    ids = phrases(2, 40, seed=0)
    changed = readdress(model, rules(model, **change), [(ids, None)])
    assert changed.kept == {0: 1.0, 2: 1.0}
    assert torch.equal(logits(changed.model, ids), logits(model, ids))
    other = torch.randint(30, VOCABULARY, (2, 40))
    assert not torch.equal(logits(changed.model, other), logits(model, other))
    specification = changed.model.config.memory_config.specification
    assert specification.digest == changed.model.model.seal.digest != model.model.seal.digest


def test_tables_of_another_dtype_than_the_model_keep_it():
    model = tiny_model(table_dtype="bf16")
    ids = phrases(2, 40, seed=0)
    changed = readdress(model, rules(model, **BIG), [(ids, None)])
    tables = changed.model.model.tables.values()
    assert {table.weight.dtype for table in tables} == {torch.bfloat16}
    assert changed.model.dtype == torch.float32
    assert torch.equal(logits(changed.model, ids), logits(model, ids))


def test_packed_documents_go_along_as_attention_sees_them():
    model = trained_model()
    ids = phrases(2, 40, seed=0)
    positions = torch.cat([torch.arange(17), torch.arange(23)]).expand(2, -1)
    changed = readdress(model, rules(model, **BIG), [(ids, positions)]).model
    with torch.no_grad():
        before, after = (
            each(ids, position_ids=positions, use_cache=False).logits for each in (model, changed)
        )
    assert torch.equal(before, after)
    unpacked = readdress(model, rules(model, **BIG), [(ids, None)]).model
    with torch.no_grad():
        without = unpacked(ids, position_ids=positions, use_cache=False).logits
    assert not torch.equal(before, without)


def test_where_n_grams_meet_the_row_read_most_stays():
    # A slow reference: one dictionary a head.
    model = trained_model()
    batches = [(phrases(2, 40, seed=seed), None) for seed in range(7)]
    smaller = rules(model, rows_per_head=(7, 11), seed=3)
    changed, kept = readdress(model, smaller, batches)
    old, new = model.model.addresses, changed.model.addresses
    for index, layer in enumerate(smaller.layers):
        wishes: dict[int, Counter[int]] = {}
        for ids, _ in batches:
            pairs = zip(old.rows(ids)[index].flatten(), new.rows(ids)[index].flatten(), strict=True)
            for source, target in pairs:
                wishes.setdefault(int(target), Counter())[int(source)] += 1
        stayed = 0
        source_table = model.model.tables[str(layer)].weight
        target_table = changed.model.tables[str(layer)].weight
        for target, sources in wishes.items():
            most = min(sources, key=lambda row: (-sources[row], row))
            assert torch.equal(target_table[target], source_table[most])
            stayed += sources[most]
        assert kept[layer] == pytest.approx(stayed / sum(c.total() for c in wishes.values()))
        assert 0 < kept[layer] < 1


def test_heads_and_layers_added_say_nothing_at_first():
    model = copy.deepcopy(trained_model())
    ids = phrases(2, 40, seed=0)
    more = rules(model, heads=3, layers=(0, 1, 2), **BIG)
    changed = readdress(model, more, [(ids, None)]).model
    # Projections of zero columns more: the same sums, in blocks of other sizes.
    torch.testing.assert_close(logits(changed, ids), logits(model, ids), rtol=0, atol=1e-4)
    fuse = changed.train().model.layers[0].engram
    changed(ids, labels=ids, use_cache=False).loss.backward()
    gradient = fuse.kv.weight.grad.unflatten(1, (2, 3, 8))
    assert gradient[:, :, 2].any() and changed.model.layers[1].engram.kv.weight.grad.any()


def test_an_order_is_added_where_no_convolution_hangs_on_the_highest():
    model = trained_model(1, False)
    ids = phrases(2, 40, seed=0)
    more = rules(model, rows_per_head=(100_003,) * 3)
    changed = readdress(model, more, [(ids, None)]).model
    torch.testing.assert_close(logits(changed, ids), logits(model, ids), rtol=0, atol=1e-4)
    assert changed.model.addresses.specification.max_order == 4


@pytest.mark.parametrize("streams", [1, 4])
def test_without_reads_rows_are_new_and_the_backbone_speaks_alone(streams):
    model = trained_model(streams)
    changed, kept = readdress(model, rules(model, seed=9))
    assert kept == {0: 0.0, 2: 0.0}
    with model.model.without_memory():
        assert torch.equal(logits(changed), logits(model))
    assert not torch.equal(changed.model.tables["0"].weight, model.model.tables["0"].weight)
    assert not torch.equal(logits(changed), logits(model))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": (0,)}, r"layers=\(0,\): the memory of layer 2 would be lost"),
        ({"heads": 1}, "heads=1: the model has 2 per order"),
        ({"rows_per_head": (50,)}, "orders up to 2: the model has 3"),
        ({"rows_per_head": (50,) * 3}, "the short convolution's dilation is the highest order, 3"),
        ({"layers": (0, 2, 3)}, "the model has layers 0 to 2"),
    ],
)
def test_what_would_be_lost_is_refused_in_one_line(change, words):
    model = trained_model()
    with pytest.raises(ConfigError, match=words):
        readdress(model, rules(model, **change))
    with pytest.raises(DataError, match="reads: no token"):
        readdress(model, rules(model), [])


SHAPE = [
    *("--set=model.hidden_size=32", "--set=model.num_hidden_layers=3"),
    '--set=model.mlp_layer_types=["sparse","sparse","sparse"]',
]


def train(out, data, *arguments, steps=20, lr=0.001):
    """The lines that a run logs."""
    small = [f"--data={data}", "--seed=3", "--threads=1", "--json", f"--tokens={steps * 4096}"]
    small += ["--set=train.batch=4", "--set=train.context=32", f"--set=train.lr={lr}"]
    small += [f"--set=train.tokens={steps * 128}"]
    assert main(["train", f"--out={out}", *small, *arguments]) == 0
    return read_metrics(out)


@pytest.fixture(scope="module")
def grafted(prepared, tmp_path_factory):
    """A MoE trained a little on real text, and the same given a memory, both saved."""
    root = tmp_path_factory.mktemp("grafted")
    train(root / "moe", prepared, "--preset=nano-moe", *SHAPE, lr=0.004)
    model = EngramLMForCausalLM.from_pretrained(root / "moe" / "model")
    torch.manual_seed(0)
    memory = MemoryConfig(
        specification=Specification(layers=(1,), rows_per_head=(500, 500), heads=2, pad_id=1),
        head_dim=8,
    )
    given = give_memory(model, memory, corpus.tokenizer())
    given.save_pretrained(root / "given")
    corpus.tokenizer().save_pretrained(root / "given")
    return root


def test_training_starts_from_a_model_given_a_memory(grafted, prepared, tmp_path, capsys):
    given = train(tmp_path / "given", prepared, "--from", str(grafted / "given"))
    plain = train(tmp_path / "plain", prepared, "--from", str(grafted / "moe" / "model"))
    # The same first batch, and a memory that says nothing yet.
    assert given[0]["loss"] == plain[0]["loss"] and given[1]["loss"] != plain[1]["loss"]
    assert given[-1]["validation_bpb"] < read_metrics(grafted / "moe")[-1]["validation_bpb"]
    before = EngramLMForCausalLM.from_pretrained(grafted / "given").model.tables["1"].weight
    after = EngramLMForCausalLM.from_pretrained(tmp_path / "given" / "model")
    moved = (after.model.tables["1"].weight != before).any(dim=1)
    assert moved.float().mean() > 0.5
    assert contents.read(tmp_path / "given" / "model").whole


@pytest.mark.parametrize("frozen", [["tables"], ["tables.1"], ["backbone"]], ids=str)
def test_frozen_parts_keep_their_bits(grafted, prepared, tmp_path, frozen):
    option = f"--set=train.frozen={json.dumps(frozen)}"
    train(tmp_path, prepared, "--from", str(grafted / "given"), option, steps=4)
    before, after = (
        EngramLMForCausalLM.from_pretrained(path).state_dict()
        for path in (grafted / "given", tmp_path / "model")
    )
    tables = {name for name in before if ".tables." in name}
    backbone = {name for name in before if ".engram." not in name} - tables
    still = backbone if frozen == ["backbone"] else tables
    # Routing biases, which no gradient moves, are part of the backbone too.
    assert any("e_score" in name for name in backbone) and tables
    assert all(torch.equal(before[name], after[name]) for name in still)
    for part in (backbone, tables, set(before) - backbone - tables):
        moved = any(not torch.equal(before[name], after[name]) for name in part)
        assert moved != (part == still)


def test_a_frozen_part_has_no_optimiser_state():
    model = tiny_model()
    freeze(model, ("tables.2", "backbone"))
    found = groups(model)
    assert [table is model.model.tables["0"] for table in found.tables] == [True]
    fusion = [p for name, p in model.named_parameters() if ".engram." in name]
    assert set(fusion) == {*found.matrices, *found.others} and not found.stacks
    with pytest.raises(ConfigError, match="frozen='rows': accepted are backbone, fusion, tables, "):
        freeze(model, ("rows",))
    with pytest.raises(ConfigError, match="frozen=fusion, tables: nothing is left to train"):
        freeze(model, ("fusion", "tables"))


def test_what_training_cannot_start_from_is_refused_in_one_line(grafted, tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    other = tmp_path / "other"
    shutil.copytree(grafted / "moe" / "model", other)
    changed = json.loads((other / "tokenizer.json").read_text())
    names = changed["model"]["vocab"]
    names["the"], names["ing"] = names["ing"], names["the"]
    (other / "tokenizer.json").write_text(json.dumps(changed))
    given = str(grafted / "given")
    for arguments, words in (
        (["--from", str(tmp_path)], "no config.json"),
        (["--from", given, "--preset=nano-moe"], "--preset and model.* are not taken"),
        (["--from", given, "--set=model.streams=4"], "--preset and model.* are not taken"),
        (["--from", given, '--set=train.frozen=["x"]'], "frozen='x': accepted are backbone"),
        (["--from", str(other)], "tokens that are not the 8192 of the tokenizer to train with"),
    ):
        assert main(["train", out, "--tokens=4096", *arguments]) == 2
        captured = capsys.readouterr()
        assert words in captured.err and "Traceback" not in captured.err
