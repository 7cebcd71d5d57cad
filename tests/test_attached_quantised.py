"""A memory on a backbone that bitsandbytes has quantised, on a CPU."""

import pytest
import torch
from attached_worker import trainer, with_lora
from families import bare, memory
from peft import prepare_model_for_kbit_training
from test_trainer import bits, differing, losses
from tiny import canonical_map, phrases
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import engram_lm
from engram_lm import JointOptimizer
from engram_lm.train.freeze import freeze

pytest.importorskip("bitsandbytes", reason="quantised backbones need bitsandbytes")
pytestmark = [
    # transformers' new names for what PEFT still calls by the old ones.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
    # bitsandbytes casts what 8 bits cannot multiply, and says so each time.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]
QUANTISED = {
    4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    8: {"load_in_8bit": True},
}


def memory_of(model):
    return {n: p for n, p in model.named_parameters() if ".engram." in n or ".tables." in n}


def quantised(width, path):
    bare("llama", hidden_size=64, head_dim=16, intermediate_size=128).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=BitsAndBytesConfig(**QUANTISED[width]),
        device_map="cpu",
        dtype=torch.float32,
    )


@pytest.mark.parametrize("width", QUANTISED)
def test_a_quantised_backbone_keeps_its_bits_under_a_memory_that_trains(width, tmp_path):
    model = quantised(width, tmp_path / "bare").train()
    ids = phrases(4, 20, seed=0)
    before = model(ids).logits
    engram_lm.attach(model, canonical_map(), memory())
    assert torch.equal(model(ids).logits, before)
    freeze(model, ("backbone",))
    assert all(
        p.dtype == torch.float32
        for n, p in model.named_parameters()
        if (".engram." in n or ".tables." in n)
    )
    optimizer, weights, lost = JointOptimizer(model, lr=0.02), bits(model), []
    for _ in range(10):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lost.append(loss.item())
    assert lost[-1] < lost[0] - 0.3
    moved = differing(weights, bits(model))
    assert set(moved) == {
        name for name, _ in model.named_parameters() if (".engram." in name or ".tables." in name)
    }
    model.save_pretrained(tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cpu")
    assert type(opened.model.layers[0].engram.kv) is torch.nn.Linear
    assert type(opened.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    assert torch.equal(opened.train()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("width", QUANTISED)
def test_trainer_trains_lora_and_a_memory_on_a_quantised_backbone(width, tmp_path):
    model = quantised(width, tmp_path / "bare")
    engram_lm.attach(model, canonical_map(), memory())
    model = with_lora(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
    weights = bits(model)
    run = trainer(model, tmp_path, max_steps=10, learning_rate=0.02)
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.3
    moved = set(differing(weights, bits(model)))
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
