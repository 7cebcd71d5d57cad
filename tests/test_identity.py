"""A changed model is another model, and our subclasses get what transformers' own classes get."""

import copy
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import attached, bare, memory, speak
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from safetensors import safe_open
from test_trainer import ALONE
from tiny import VOCABULARY, canonical_map, tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from trl.trainer.utils import create_model_from_path

import engram_lm
from engram_lm import AttachedForCausalLM, EngramCallback, give_memory, readdress, twin
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.model import attached as classes
from engram_lm.model.contents import read
from engram_lm.model.identity import NO_NAME, UNSAVED

pytestmark = [
    # transformers' new names for what PEFT still calls by the old ones.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT, of a model that it cannot open by its name.
    pytest.mark.filterwarnings("ignore:Could not find a config file in a model changed"),
]

IDS = torch.randint(2, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(9))
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}


def logits(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def given(model):
    """The model with a memory that speaks."""
    engram_lm.attach(model, canonical_map(), memory())
    speak(model)
    return model.eval()


def other(name: str, **sizes):
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    return given(getattr(transformers, f"{name}ForCausalLM")(config))


def reopened(model, directory):
    """Given a memory after it was opened, as checkpoints of others are."""
    model.save_pretrained(directory)
    return given(AutoModelForCausalLM.from_pretrained(directory))


PARTICULAR = {
    "falcon_h1": lambda _: other("FalconH1", mamba_d_ssm=32, mamba_chunk_size=8, **MAMBA),
    "ernie": lambda _: other("Ernie4_5_Moe", moe_num_experts=4, moe_intermediate_size=16, moe_k=2),
    "gpt_neox, opened": lambda path: reopened(bare("gpt_neox"), path),
    "qwen3_moe, opened": lambda path: reopened(bare("qwen3_moe"), path),
    "qwen3_moe": lambda _: attached("qwen3_moe"),
    "gemma3": lambda _: attached("gemma3"),
    "ours": lambda _: tiny_model(streams=4),
}
"""Buffers that are not saved (a vector of scales, positions, rotary frequencies), and weights whose
names in files are not those of modules."""


@pytest.mark.parametrize("name", PARTICULAR)
def test_every_buffer_and_logit_of_a_reopened_model_is_the_same(name, tmp_path):
    model = PARTICULAR[name](tmp_path / "bare")
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    buffers = dict(opened.named_buffers())
    assert {key for key, _ in model.named_buffers()} == buffers.keys()
    assert all(torch.equal(buffers[key], buffer) for key, buffer in model.named_buffers())
    assert torch.equal(logits(opened), logits(model))
    assert read(tmp_path).problems == ()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_neox"])
def test_files_hold_the_familys_weights_under_the_familys_names(family, tmp_path):
    model = bare(family)
    names = []
    for directory in (tmp_path / "bare", tmp_path / "ours"):
        model.save_pretrained(directory)
        with safe_open(directory / "model.safetensors", "pt") as file:
            names.append(set(file.keys()))
        if directory.name == "bare":
            given(model)
    plain, ours = names
    assert plain < ours
    assert all(".engram." in name or "tables." in name or "seal." in name for name in ours - plain)


def test_what_a_family_may_set_ours_may_too():
    for family in ("llama", "qwen3_moe", "gpt_neox"):
        model = attached(family)
        for kind in (type(model), type(model.base_model)):
            own = kind.family
            assert kind._can_set_experts_implementation() == own._can_set_experts_implementation()
            assert kind._can_set_attn_implementation() == own._can_set_attn_implementation()
            assert not kind.is_custom_code()


@pytest.mark.parametrize("make", [lambda: attached("llama"), tiny_model], ids=["llama", "ours"])
def test_trainers_label_smoothing_is_that_of_a_causal_model(make, tmp_path):
    model = make()
    settings = TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.5, use_cpu=True, report_to=[]
    )
    loss = Trainer(model=model, args=settings).compute_loss(
        model, {"input_ids": IDS, "labels": IDS}
    )
    scores = logits(model)[:, :-1].log_softmax(-1)
    nll = -scores.gather(2, IDS[:, 1:, None]).mean()
    assert torch.allclose(loss, 0.5 * nll - 0.5 * scores.mean(), atol=1e-5)


def named(directory):
    """A bare model that knows where it came from."""
    bare("llama").save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)


def test_a_model_given_a_memory_in_place_is_opened_by_no_name_until_it_is_saved(
    tmp_path, monkeypatch
):
    model = named(tmp_path / "bare")
    engram_lm.attach(model, canonical_map(), memory())
    assert model.config.architectures == ["EngramLlamaForCausalLM"]
    for part in (model, model.base_model):
        assert part.config.name_or_path == UNSAVED and part.name_or_path == NO_NAME
    with pytest.raises(DataError, match="save_pretrained it, and open that directory"):
        create_model_from_path(model.config.name_or_path)  # TRL's reference model
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="changed and not saved since"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "whole")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert opened.config.name_or_path == opened.name_or_path == str(tmp_path / "whole")
    assert engram_lm.detach(model).config.name_or_path == str(tmp_path / "bare")
    assert model.name_or_path == str(tmp_path / "bare")
    assert model.config.architectures == ["LlamaForCausalLM"]
    # Nobody knows where the backbone of this one was.
    assert engram_lm.detach(opened).config.name_or_path == UNSAVED


def test_a_familys_class_refuses_a_configuration_of_ours(tmp_path):
    attached("llama").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="open it with AutoModelForCausalLM"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=config)
    for kind in (AutoModelForCausalLM, AttachedForCausalLM):
        opened = kind.from_pretrained(tmp_path, config=config)
        assert isinstance(opened, AttachedForCausalLM)


def test_an_adapter_of_a_saved_model_is_opened_with_its_memory(tmp_path):
    attached("llama").save_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(again.base_model.model, AttachedForCausalLM)
    assert torch.equal(logits(again), logits(adapted))


def test_a_model_with_another_memory_does_not_go_by_the_name_of_the_first(tmp_path):
    tiny_model(memory=None).save_pretrained(tmp_path / "bare")
    tiny_model().save_pretrained(tmp_path / "given")
    first, second = map(
        AutoModelForCausalLM.from_pretrained, (tmp_path / "bare", tmp_path / "given")
    )
    specification = replace(second.config.memory_config.specification, seed=7)
    for model in (
        give_memory(first, tiny_config().memory_config, canonical_map()),
        readdress(second, specification).model,
    ):
        assert model.config.name_or_path == UNSAVED and model.name_or_path == NO_NAME
        assert model.model.name_or_path == NO_NAME
    assert twin(second.config, 0.6).name_or_path == ""
    assert first.config.name_or_path == str(tmp_path / "bare")


@pytest.mark.parametrize("make", [lambda: attached("llama"), tiny_model], ids=["llama", "ours"])
def test_trl_opens_our_directories_by_path(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    opened = create_model_from_path(str(tmp_path))
    assert type(opened) is type(model)
    assert torch.equal(logits(opened), logits(model))


def test_opening_one_of_ours_says_nothing(tmp_path):
    attached("mistral").save_pretrained(tmp_path)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = transformers.logging.get_logger()
    logger.addHandler(handler)
    try:
        kind = type(AutoModelForCausalLM.from_pretrained(tmp_path))
        for opens in (AttachedForCausalLM, kind, AutoConfig, kind.config_class):
            opens.from_pretrained(tmp_path)
        assert not lines
        AutoModel.from_pretrained(tmp_path)  # names the head's weight, as of every model
        assert not any("engram_attached" in line for line in lines)
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("make", "families"),
    [
        (lambda: attached("llama"), ("LlamaForCausalLM", "LlamaModel", "MistralForCausalLM")),
        (lambda: attached("qwen3_moe"), ("Qwen3MoeForCausalLM", "Qwen3MoeModel")),
        (tiny_model, ("DeepseekV3ForCausalLM", "DeepseekV3Model")),
    ],
    ids=["llama", "qwen3_moe", "ours"],
)
def test_a_familys_own_class_does_not_open_one_of_ours_without_its_memory(make, families, tmp_path):
    make().save_pretrained(tmp_path)
    for family in families:
        with pytest.raises(
            ValueError, match="import engram_lm and open it with AutoModelForCausal"
        ):
            getattr(transformers, family).from_pretrained(tmp_path)


def test_a_configuration_that_comes_from_elsewhere_makes_models_with_its_memory():
    kind = classes.EngramStableLmConfig  # as unpickling in a process that has opened none
    config = kind(**SIZES, memory=tiny_config().memory)
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, AttachedForCausalLM) and model.model.reads_memory
    with pytest.raises(ConfigError, match="no canonical map"):
        logits(model)


def test_a_class_of_ours_opens_its_own_family_alone(tmp_path):
    attached("llama").save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="a 'llama' with memory, not a 'mistral'"):
        type(attached("mistral")).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


ADAPTERS = {
    "lora": (lambda: attached("llama"), LoraConfig(init_lora_weights=False)),
    "experts": (
        lambda: attached("qwen3_moe"),
        LoraConfig(
            init_lora_weights=False,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj"],
        ),
    ),
    "ia3": (lambda: attached("qwen3"), IA3Config(init_ia3_weights=False)),
    "ours": (tiny_model, LoraConfig(init_lora_weights=False, target_modules=["o_proj"])),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_model_with_an_adapter_of_its_own_is_saved_with_all_that_it_stands_on(kind, tmp_path):
    make, adapter = ADAPTERS[kind]
    model = make()
    plain = logits(model)
    model.add_adapter(adapter)
    speak(model)  # trained beside the adapter
    wanted = logits(model.eval())
    assert not torch.equal(wanted, plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), wanted)
    for opens in (AutoModelForCausalLM, type(model)):
        opened = opens.from_pretrained(tmp_path)
        assert type(opened) is type(model)
        assert torch.equal(logits(opened), wanted)
    assert read(tmp_path).problems == ()


def test_a_save_that_would_be_less_than_the_whole_is_refused_before_anything_is_written(tmp_path):
    model = attached("llama")
    part = {key: value for key, value in model.state_dict().items() if ".engram." not in key}
    with pytest.raises(ConfigError, match=r"state_dict: without model.layers.0.engram.conv.norm_w"):
        model.save_pretrained(tmp_path, state_dict=part)
    own = tiny_model()
    part = {key: value for key, value in own.state_dict().items() if "tables" not in key}
    with pytest.raises(ConfigError, match=r"state_dict: without model.tables.0.weight and 1 more"):
        own.save_pretrained(tmp_path, state_dict=part)
    model.add_adapter(LoraConfig())
    for name, value in (("state_dict", model.state_dict()), ("push_to_hub", True)):
        with pytest.raises(ConfigError, match=f"{name}: not of a model with an adapter"):
            model.save_pretrained(tmp_path, **{name: value})
    assert not list(tmp_path.iterdir())
    own.save_pretrained(tmp_path, state_dict=own.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "engram_lm"


def test_trainer_does_not_go_on_from_a_checkpoint_with_an_adapter_that_it_cannot_fill():
    model = attached("llama")
    model.add_adapter(LoraConfig())
    with pytest.raises(ConfigError, match="step 7: Trainer fills no adapter of add_adapter"):
        EngramCallback().on_train_begin(
            SimpleNamespace(**ALONE), SimpleNamespace(global_step=7), None, model=model
        )
