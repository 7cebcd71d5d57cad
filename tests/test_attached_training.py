"""Other families' models with a memory are trained by Trainer, PEFT, TRL and accelerate."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import attached_worker
import pytest
import torch
from attached_worker import LORA, Watch, assert_alike, given, tables, trainer, watched, with_lora
from datasets import Dataset
from families import attached, bare, speak
from peft import LoraConfig, PeftModel, get_peft_model
from test_trainer import ALONE, SEQUENCES, bits, differing, losses
from tiny import phrases
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening
from trl import SFTConfig, SFTTrainer

import engram_lm
from engram_lm import EngramCallback, JointOptimizer, MemoryConfig, Specification, corpus
from engram_lm.errors import AddressError, ConfigError
from engram_lm.train.freeze import freeze

pytestmark = [
    # transformers' new names for what PEFT and TRL still call by the old ones.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT, of a model that it cannot open by its name.
    pytest.mark.filterwarnings("ignore:Could not find a config file in a model changed"),
]


def is_memory(name):
    return ".engram." in name or ".tables." in name


def with_moments(model, optimizer):
    """Names of the parameters that any optimiser keeps something of."""
    kept = {id(p) for each in optimizer.optimizers.each.values() for p in each.state}
    return {name for name, parameter in model.named_parameters() if id(parameter) in kept}


@pytest.mark.parametrize(
    ("kind", "family"),
    [("memory", "llama"), ("lora", "llama"), ("everything", "llama"), ("everything", "qwen3_moe")],
)
def test_trainer_trains_what_it_is_to_and_nothing_else(kind, family, tmp_path):
    model = given(kind, family)
    before = bits(model)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    run = trainer(model, tmp_path, max_steps=16, learning_rate=0.02)
    run.train()
    optimizer = run.optimizer.optimizer
    assert losses(run)[-1] < losses(run)[0] - 0.3
    moved = set(differing(before, bits(model)))
    assert moved == with_moments(model, optimizer) == trains
    assert all(map(is_memory, moved)) == (kind == "memory")
    assert all(table.row_gradient is None for table in tables(model).values())


def test_rows_move_where_they_were_read_and_nowhere_else(tmp_path):
    model = attached("llama").train()
    freeze(model, ("backbone",))
    ids = SEQUENCES[:2, :12]
    # The last position predicts nothing, so its rows have a gradient of zero.
    read_LBTH = model.model.memory.start(ids).rows_LBTH[:, :, :-1]
    before = bits(model)
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer(model, tmp_path, data, max_steps=1, warmup_steps=0).train()
    for rows, name in zip(read_LBTH, ("model.tables.0", "model.tables.2"), strict=True):
        changed = (before[f"{name}.weight"] != bits(model)[f"{name}.weight"]).any(1)
        assert changed.nonzero().flatten().tolist() == rows.unique().tolist()
        assert 0 < changed.sum() < len(changed)


@pytest.mark.parametrize("kind", ["memory", "everything"])
def test_trainer_resumes_bit_for_bit(kind, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    model = given(kind)
    run = trainer(model, tmp_path / "whole", **saved)
    run.train()
    again = given(kind, seed=5)
    resumed = trainer(again, tmp_path / "resumed", **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert differing(bits(again), bits(model)) == []
    assert losses(resumed) == losses(run)


def test_accumulated_batches_are_one_batch(tmp_path):
    whole, parts = (attached("llama").train() for _ in range(2))
    one = trainer(whole, tmp_path, max_steps=2, per_device_train_batch_size=8)
    two = trainer(
        parts, tmp_path, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    one.train()
    two.train()
    assert_alike(watched(two), watched(one))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_activation_checkpointing_changes_no_bit(tmp_path):
    found = []
    for checkpointing in (False, True):
        model = given("memory")
        run = trainer(model, tmp_path, max_steps=3, activation_checkpointing=checkpointing)
        run.train()
        found.append((bits(model), losses(run)))
    assert differing(found[0][0], found[1][0]) == [] and found[0][1] == found[1][1]


def test_lora_beside_a_memory_is_saved_apart_from_it_or_merged(tmp_path):
    model = given("lora")
    trainer(model, tmp_path, max_steps=6).train()
    ids = phrases(2, 15, seed=9)
    model.eval()
    wanted = model(ids).logits
    text = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.equal(opened(ids).logits, wanted)
    again = PeftModel.from_pretrained(opened, tmp_path / "adapter")
    assert torch.equal(again(ids).logits, wanted)
    merged = again.merge_and_unload()
    assert isinstance(merged, engram_lm.AttachedForCausalLM)
    assert torch.equal(merged.generate(ids, max_new_tokens=8, do_sample=False), text)
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(whole(ids).logits, wanted, atol=1e-4, rtol=0)
    assert torch.equal(whole(ids).logits, merged(ids).logits)


def adapted(**settings):
    """What LoRA stands beside in the layer that has memory, by default or as said."""
    model = attached("llama")
    model = get_peft_model(model, LoraConfig(**settings))
    names = [name.split(".layers.2.") for name, _ in model.named_modules() if "lora_A" in name]
    return {name[1].split(".lora_A")[0] for name in names if len(name) == 2}


def test_peft_finds_the_familys_own_modules():
    usual = {"self_attn.q_proj", "self_attn.v_proj"}
    assert adapted() == adapted(target_modules=["q_proj", "v_proj"]) == usual
    everywhere = adapted(target_modules="all-linear")
    without = adapted(target_modules="all-linear", exclude_modules=r".*\.engram\..*")
    assert len(without) == 7 and everywhere - without == {"engram.kv"}


def test_what_would_leave_a_memory_behind_is_refused_in_one_line():
    model = given("memory")
    joint = JointOptimizer(model, lr=0.01)
    frozen = get_peft_model(model, LoraConfig(**LORA))
    unfrozen = given("lora")
    later = JointOptimizer(unfrozen, lr=0.01)
    begun, none = SimpleNamespace(global_step=0), {}
    resumed = SimpleNamespace(global_step=7)
    for settings, state, model, optimizer, words in (
        (none, begun, frozen, joint, "tables.0: in the optimiser, but frozen since"),
        (none, begun, given(), None, "tables.0: AdamW does not see the gradients of rows"),
        (none, resumed, unfrozen, later, "step 7: a checkpoint of PEFT holds the adapter and no"),
        ({"label_smoothing_factor": 0.1}, begun, unfrozen, later, "label_smoothing_factor=0.1: Tr"),
    ):
        other = torch.optim.AdamW(model.parameters()) if optimizer is None else optimizer
        with pytest.raises(ConfigError, match=words):
            EngramCallback().on_train_begin(
                SimpleNamespace(**{**ALONE, **settings}), state, None, model=model, optimizer=other
            )


def dictionary(kind="memory"):
    """A model and short documents of the corpus that ships with the package."""
    tokenizer = corpus.tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
    model = bare("llama", vocab_size=len(tokenizer), **ids)
    specification = Specification(
        layers=(0, 2),
        rows_per_head=(500, 500),
        heads=2,
        pad_id=tokenizer.pad_token_id,
        boundary_rule="document",
    )
    engram_lm.attach(model, tokenizer, MemoryConfig(specification=specification, head_dim=8))
    speak(model)
    if kind == "memory":
        freeze(model, ("backbone",))
    texts = Dataset.from_dict({"text": corpus.documents("validation")[:24]})
    return with_lora(model) if kind == "lora" else model, tokenizer, texts


def sft(out, kind="memory", **changes):
    model, tokenizer, texts = dictionary(kind)
    settings = {"logging_steps": 1, "max_steps": 6, "max_length": 64, "save_strategy": "no"}
    settings |= {"use_cpu": True, "bf16": False, "report_to": [], "dataloader_pin_memory": False}
    args = SFTConfig(
        output_dir=str(out),
        learning_rate=0.02,
        max_grad_norm=0.0,
        per_device_train_batch_size=8,
        **{**settings, "disable_tqdm": True, **changes},
    )
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=texts,
        processing_class=tokenizer,
        optimizers=(JointOptimizer(model, lr=args.learning_rate, clip=1.0), None),
        callbacks=[EngramCallback(), Watch(model)],
    )


@pytest.mark.parametrize("kind", ["memory", "lora"])
def test_trls_sft_trainer_trains_a_memory_alone_and_beside_lora(kind, tmp_path):
    run = sft(tmp_path, kind)
    model = run.model
    before = bits(model)
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.3
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(differing(before, bits(model))) == with_moments(model, run.optimizer.optimizer)
    assert with_moments(model, run.optimizer.optimizer) == trains
    assert all(map(is_memory, trains)) == (kind == "memory")


@pytest.mark.parametrize("packed", [{"packing": True}, {"padding_free": True, "max_length": None}])
def test_documents_that_trl_packs_do_not_read_each_other(packed, tmp_path):
    run = sft(tmp_path, max_steps=1, **packed)
    batch = next(iter(run.get_train_dataloader()))
    positions, ids, labels = (batch[name][0] for name in ("position_ids", "input_ids", "labels"))
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
    assert len(starts) > 8 and "attention_mask" not in batch
    model = run.model.eval()
    logits = model(**{**batch, "use_cache": False}).logits[0]
    alone = [model(ids[None, a:b]).logits[0] for a, b in pairwise(starts)]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-4, rtol=0)
    joined = model(ids[None], use_cache=False).logits[0]
    assert (joined - logits).abs().max() > 0.1
    loss = run.compute_loss(model, dict(batch))
    apart = torch.nn.functional.cross_entropy(torch.cat(alone)[:-1], labels[1:])
    torch.testing.assert_close(loss, apart, atol=1e-5, rtol=0)
    run.train()


def test_trainer_packs_without_a_cache_and_a_loop_of_ones_own_says_so(tmp_path):
    model = given()
    data = [{"input_ids": row.tolist()} for row in SEQUENCES]
    run = trainer(model, tmp_path, data, max_steps=2)
    run.data_collator = DataCollatorWithFlattening()
    run.train()
    batch, model = run.data_collator(data[:3]), given()
    with pytest.raises(AddressError, match=r"use_cache=False"):
        model(**batch)
    model.config.use_cache = False
    model(**batch).loss.backward()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two workers found, each of its own."""
    out = tmp_path_factory.mktemp("two")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(__file__).with_name("attached_worker.py")
    subprocess.run(
        [sys.executable, *launch, str(worker), str(out)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    return [torch.load(out / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["memory", "everything", "lora"])
def test_two_workers_with_all_rows_each_train_as_one_does(kind, two, tmp_path):
    model = given(kind)
    run = trainer(model, tmp_path, max_steps=4, per_device_train_batch_size=8)
    run.train()
    assert differing(*(each[kind]["bits"] for each in two)) == []
    for found in two:
        assert_alike(found[kind]["first"], watched(run))
        # From the second step on Adam and Muon take steps of full size of gradients near zero.
        assert found[kind]["losses"] == pytest.approx(losses(run), rel=1e-2)


def test_two_workers_under_our_trainer_are_those_set_up_by_hand(two):
    for found in two:
        assert differing(found["natural"]["bits"], found["everything"]["bits"]) == []
        assert found["natural"]["losses"] == found["everything"]["losses"]


def test_two_workers_with_half_of_the_rows_each_train_as_one_does(two):
    alone = attached_worker.accelerated()
    first, second = (each["sharded"] for each in two)
    assert first["dense"] == second["dense"] == alone["dense"] == []
    rows = {name: torch.cat([first["rows"][name], second["rows"][name]]) for name in first["rows"]}
    assert all(len(each) < len(rows[name]) for name, each in first["rows"].items())
    merged = {
        name: torch.cat([mine, second["first"][name]]) if ".tables." in name else mine
        for name, mine in first["first"].items()
    }
    assert_alike(merged, alone["first"])
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-3)
    opened = AutoModelForCausalLM.from_pretrained(first["exported"])
    assert all(torch.equal(each.weight, rows[name]) for name, each in tables(opened).items())
