"""Attach, construct, train(): the rows have moved, whatever the order of calls."""

import pytest
import torch
from attached_worker import LORA, given, tables, trainer
from families import attached, bare
from peft import LoraConfig, get_peft_model
from test_attached_training import dictionary, is_memory
from test_trainer import Phrases, arguments, bits, differing, losses, tiny_trained
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from engram_lm import (
    EngramCallback,
    EngramTrainer,
    EngramTrainerMixin,
    JointOptimizer,
    UntrainedRowsWarning,
)
from engram_lm.errors import ConfigError
from engram_lm.train.freeze import freeze

pytestmark = [
    # transformers' new names for what PEFT and TRL still call by the old ones.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
]


class MemorySFTTrainer(EngramTrainerMixin, SFTTrainer):
    """As the documentation makes it."""


def natural(model, out, kind=EngramTrainer, callbacks=None, optimizers=(None, None), **changes):
    settings = {"max_grad_norm": 1.0, "save_strategy": "no", "max_steps": 3, **changes}
    return kind(
        model=model,
        args=arguments(out, **settings),
        train_dataset=Phrases(),
        callbacks=callbacks,
        optimizers=optimizers,
    )


def test_it_trains_as_trainer_does_with_everything_set_up_by_hand(tmp_path):
    for kind in ("everything", "lora"):
        model, other = given(kind), given(kind)
        before = bits(model)
        run = natural(model, tmp_path, weight_decay=0.1, max_steps=2, warmup_steps=0)
        assert run.args.max_grad_norm == 0.0
        run.train()
        by_hand = trainer(other, tmp_path, max_steps=2, warmup_steps=0)
        by_hand.train()
        assert differing(bits(model), bits(other)) == [] and losses(run) == losses(by_hand)
        moved = differing(before, bits(model))
        assert {f"{name}.weight" for name in tables(model)} <= set(moved)
    ours = tiny_trained()
    before = bits(ours)
    natural(ours, tmp_path).train()
    assert {"model.tables.0.weight", "model.tables.2.weight"} <= set(differing(before, bits(ours)))
    assert any("e_score" in name for name in differing(before, bits(ours)))  # it is balanced too


@pytest.mark.parametrize(("limit", "clip"), [(0.25, 0.25), (0.0, float("inf"))])
def test_the_limit_of_the_gradient_norm_is_for_rows_too(limit, clip, tmp_path):
    args = arguments(tmp_path, max_grad_norm=limit, max_steps=1, save_strategy="no")
    run = EngramTrainer(given(), args, train_dataset=Phrases())
    run.train()
    assert run.optimizer.optimizer.clip == clip
    assert args.max_grad_norm == limit  # of which others may make trainers


def test_it_resumes_bit_for_bit(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    model, again = given("everything"), given("everything", seed=5)
    natural(model, tmp_path / "whole", **saved).train()
    resumed = natural(again, tmp_path / "resumed", **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert differing(bits(again), bits(model)) == []


@pytest.mark.parametrize("kind", ["memory", "peft_config", "peft_model"])
def test_trls_trainer_with_the_mixin_moves_rows(kind, tmp_path):
    model, tokenizer, texts = dictionary({"peft_model": "lora"}.get(kind, kind))
    args = SFTConfig(
        output_dir=str(tmp_path),
        learning_rate=0.02,
        max_steps=2,
        max_length=64,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    adapter = {"peft_config": LoraConfig(**LORA)} if kind == "peft_config" else {}
    run = MemorySFTTrainer(
        model=model, args=args, train_dataset=texts, processing_class=tokenizer, **adapter
    )
    before = bits(run.model)
    run.train()
    moved = differing(before, bits(run.model))
    assert {f"{name}.weight" for name in tables(run.model)} <= set(moved)
    others = {name.rpartition(".lora_")[1] for name in moved if not is_memory(name)}
    assert others == (set() if kind == "memory" else {".lora_"})


def test_what_it_could_not_keep_to_is_refused_in_one_line(tmp_path):
    frozen = get_peft_model(attached("llama"), LoraConfig(**LORA))
    for model, changes, words in (
        (
            frozen,
            {},
            "the memory is frozen, as get_peft_model does; give its parameters re",
        ),
        (bare("llama"), {}, "LlamaForCausalLM: no memory to train; call engram_lm.attach"),
        (given(), {"optim": "adafactor"}, "optim=adafactor: EngramTrainer makes a JointOpt"),
        (given(), {"adam_beta2": 0.98}, "adam_beta2=0.98: EngramTrainer makes a JointOptimizer"),
        (given(), {"fp16": True}, "fp16"),
        (given(), {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    ):
        with pytest.raises((ConfigError, ValueError), match=words):
            natural(model, tmp_path, **changes).train()
    with pytest.raises(ConfigError, match="optimizer_cls_and_kwargs: EngramTrainer makes a Joint"):
        EngramTrainer(
            given(), arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-3})
        )


def test_an_optimiser_and_a_callback_of_ones_own_are_kept(tmp_path):
    model, mine = given(), EngramCallback(0.5)
    joint = JointOptimizer(model, lr=0.01, clip=1.0)
    run = natural(model, tmp_path, callbacks=[mine], optimizers=(joint, None))
    run.train()
    callbacks = run.callback_handler.callbacks
    assert run.optimizer.optimizer is joint
    assert [each for each in callbacks if isinstance(each, EngramCallback)] == [mine]
    other = given()
    two = (JointOptimizer(other, lr=0.01, clip=0.5), None)
    with pytest.raises(ConfigError, match="max_grad_norm=1.0: it does not see the gradients of"):
        natural(other, tmp_path, optimizers=two).train()  # which of the two limits is meant
    plain = (torch.optim.AdamW(other.parameters()), None)
    with pytest.raises(ConfigError, match="AdamW does not see the gradients of rows"):
        natural(other, tmp_path, optimizers=plain, max_grad_norm=0.0).train()


@pytest.mark.parametrize("make", [lambda: given("everything"), tiny_trained])
def test_trainer_without_anything_of_ours_says_that_rows_stay(make, tmp_path):
    model = make()
    with pytest.warns(UntrainedRowsWarning, match="has stepped this model and left the gradients"):
        natural(model, tmp_path, Trainer, max_steps=2).train()


def with_callback(model, out, optimizer, *others):
    return natural(
        model,
        out,
        Trainer,
        callbacks=[EngramCallback(), *others],
        optimizers=(optimizer, None),
        max_grad_norm=0.0,
        max_steps=1,
    )


def test_tables_that_are_frozen_are_named_where_training_begins(tmp_path):
    model = get_peft_model(attached("llama"), LoraConfig(**LORA))
    with pytest.warns(UntrainedRowsWarning, match="all of its memory is frozen"):
        joint = JointOptimizer(model, lr=0.01)
    run = with_callback(model, tmp_path, joint)
    with pytest.warns(UntrainedRowsWarning, match=r"tables\.0, .*tables\.2: frozen, so rows keep"):
        run.train()
    model = given("everything")
    freeze(model, ("tables.2",))
    run = with_callback(model, tmp_path, JointOptimizer(model, lr=0.01))
    with pytest.warns(UntrainedRowsWarning, match=r"^model\.tables\.2: frozen"):
        run.train()


class Later(TrainerCallback):
    """Changes the model when training has begun."""

    def __init__(self, change):
        self.change = change

    def on_step_begin(self, *args, model=None, **kwargs):
        self.change(model)


def test_the_state_at_the_first_step_counts(tmp_path):
    def freeze_rows(model):
        freeze(model, ("tables",))

    def switch_off(model):
        model.model._without_memory = True

    for change, words in (
        (freeze_rows, "tables.0: in the optimiser, but frozen since"),
        (switch_off, "tables.0: no gradient has reached its rows by the first step"),
    ):
        model = given("everything")
        run = with_callback(model, tmp_path, JointOptimizer(model, lr=0.01), Later(change))
        with pytest.raises(ConfigError, match=words):
            run.train()
    model = given("everything")
    freeze(model, ("fusion",))
    joint = JointOptimizer(model, lr=0.01)
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"engram\..*: not in the optimiser, so it would stay"):
        with_callback(model, tmp_path, joint).train()
