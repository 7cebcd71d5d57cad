"""Our module against transformers' qwen4_exp: addresses as integers, forward and backward."""

import json

import pytest
import torch
from tiny import tiny_config
from transformers import DynamicCache, Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import (
    Qwen4ExpForCausalLM,
    Qwen4ExpTextNGramEmbedding,
)

from engram_lm.config import FusionConfig, MemoryConfig, qwen4_exp
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.lookup import Memory
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.specification import Specification
from engram_lm.memory.state import DecodingState
from engram_lm.model import EngramLMForCausalLM
from engram_lm.store import released as released_module
from engram_lm.store.released import Released

EOS, VOCABULARY, T = 7, 300, 29
# Both sides compute in float32 and add in another order; entries are of order 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def theirs(**changes) -> Qwen4ExpForCausalLM:
    """A Qwen4-Exp of 2M parameters in which every weight of the memory counts."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "hc_count": 4,
        "hc_lowrank": 8,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [2, 5],
        "ple_embed_dim": 64,
        "heads_per_ngram": 4,
        "ngram_vocab_size_base": 15_000,
        "eos_token_id": [EOS, 9],  # the first one ends segments
    }
    torch.manual_seed(0)
    model = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ple." in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> Qwen4ExpForCausalLM:
    return theirs()


@pytest.fixture(scope="module")
def released(model, tmp_path_factory) -> Released:
    directory = tmp_path_factory.mktemp("qwen4_exp")
    model.save_pretrained(directory)
    return Released(directory)


@pytest.fixture
def ids() -> torch.Tensor:
    ids = torch.randint(10, VOCABULARY, (3, T), generator=torch.Generator().manual_seed(1))
    ids[0, [5, 6, 11, 28]] = EOS
    ids[1, [0, 12]] = EOS
    return ids


class Watch:
    """What the memory layers of a running Qwen4-Exp are given and give back."""

    def __init__(self, model) -> None:
        self.rows, self.hidden, self.update = {}, {}, {}
        self.hooks = []
        for layer in (1, 4):
            ple = model.model.layers[layer].ple
            table = ple.ple_embedding.ngram_embedding
            self._watch(table.register_forward_pre_hook, lambda m, i, k=layer: self.row(k, i))
            self._watch(ple.register_forward_hook, lambda m, i, o, k=layer: self.fused(k, i, o))

    def _watch(self, register, hook) -> None:
        self.hooks.append(register(hook))

    def row(self, layer, given) -> None:
        self.rows.setdefault(layer, []).append(given[0])

    def fused(self, layer, given, update) -> None:
        for kept, value in ((self.hidden, given[0]), (self.update, update)):
            kept.setdefault(layer, []).append(value.unflatten(-1, (4, 64)))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.fixture
def watch(model):
    watching = Watch(model)
    yield watching
    watching.close()


def memory_of(released) -> Memory:
    addresses = Addresses(released.memory.specification, released.canonical_map())
    return Memory(addresses, {layer: released.table(layer) for layer in released.layers})


def test_the_configuration_is_read_into_the_same_rules(released):
    specification = released.memory.specification
    assert specification.layers == (1, 4) and specification.pad_id == EOS
    assert specification.rows_per_head == (15_000, 15_000) and specification.heads == 4
    assert released.memory.head_dim == 8 and (released.streams, released.width) == (4, 64)


def test_row_numbers_equal_theirs_integer_for_integer(model, released, watch, ids):
    with torch.no_grad():
        model(ids)
    rows_LBTH = memory_of(released).start(ids).rows_LBTH
    for index, layer in enumerate(released.layers):
        assert torch.equal(rows_LBTH[index], watch.rows[layer][0])


@pytest.mark.parametrize("seed", [0, 1234, 2**40])
@pytest.mark.parametrize("orders", [1, 2, 3])
@pytest.mark.parametrize("vocabulary", [11, 300, 248_320])
def test_constants_equal_theirs_for_other_rules(seed, orders, vocabulary):
    heads = 3
    config = Qwen4ExpTextConfig(
        vocab_size=vocabulary,
        ngram_size=orders + 1,
        heads_per_ngram=heads,
        seed=seed,
        ngram_vocab_size_base=1000,
        ple_layer_ids=[1, 2, 6],
        ple_embed_dim=12 * orders * heads,
        hidden_size=32,
        num_hidden_layers=7,
        eos_token_id=3,
    )
    specification = Specification(
        layers=(0, 1, 5),
        rows_per_head=(1000,) * orders,
        heads=heads,
        seed=seed,
        pad_id=3,
        rows_multiple=128,
        canonical_rule="raw",
        multiplier_rule="splitmix64",
        boundary_rule="eos",
    ).bind(CanonicalMap.identity(vocabulary))
    for ordinal, layer in enumerate(specification.layers):
        module = Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, layer, ordinal)
        assert module.layer_multipliers.tolist() == list(specification.multipliers[layer])
        assert module.head_vocab_sizes == list(sum(specification.primes[layer], ()))
        assert module.head_offsets == list(specification.offsets(layer))
        assert module.ngram_embedding.num_embeddings == specification.table_rows(layer)


def test_the_layer_forward_equals_theirs_inside_the_running_model(model, released, watch, ids):
    with torch.no_grad():
        model(ids)
        pending = memory_of(released).start(ids)
        for layer in released.layers:
            fuse, hidden = released.fuse(layer), watch.hidden[layer][0]
            update = fuse(hidden, pending.wait(layer), pending.window).update_BTSD
            torch.testing.assert_close(update, watch.update[layer][0], **TOLERANCE)


def test_the_layer_backward_equals_theirs(model, released, ids):
    layer = 4
    ple = model.model.layers[layer].ple
    hidden = torch.randn(3, T, 4 * 64, requires_grad=True)
    upstream = torch.randn(3, T, 4 * 64)
    model.zero_grad()
    ple(hidden, ids, None).backward(upstream)

    memory, fuse = memory_of(released), released.fuse(layer)
    pending = memory.start(ids)
    vectors = pending.wait(layer).requires_grad_()
    ours = hidden.detach().unflatten(-1, (4, 64)).requires_grad_()
    update = fuse(ours, vectors, pending.window).update_BTSD
    update.backward(upstream.unflatten(-1, (4, 64)))

    rows_M = pending.rows_LBTH[1].flatten()
    row_gradient = torch.zeros(memory.stores[layer].bytes_VR.shape[0], 8)
    row_gradient.index_add_(0, rows_M, vectors.grad.reshape(-1, 8))
    keys = torch.cat([ple.key_proj.weight.grad, ple.value_proj.weight.grad])
    for mine, wanted in (
        (ours.grad.flatten(2), hidden.grad),
        (row_gradient, ple.ple_embedding.ngram_embedding.weight.grad),
        (fuse.kv.weight.grad, keys),
        (fuse.query_norm_weight.grad.flatten(), ple.norm_query.weight.grad),
        (fuse.key_norm_weight.grad.flatten(), ple.norm_key.weight.grad),
        (fuse.conv.norm_weight.grad.flatten(), ple.norm_conv.weight.grad),
        (fuse.conv.weight.grad.flatten(0, 1)[:, None], ple.conv1d.weight.grad),
    ):
        # Sums of up to 87 float32 terms, in another order.
        assert (mine - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("sizes", [[1] * T, [2, 1, 26], [28, 1], [10, 10, 9]], ids=str)
def test_decoding_with_a_cache_reads_and_gives_what_theirs_does(model, released, watch, ids, sizes):
    cache, start = DynamicCache(config=model.config), 0
    memory, state = memory_of(released), DecodingState(keep=9)
    fuses = {layer: released.fuse(layer) for layer in released.layers}
    for step, size in enumerate(sizes):
        part = ids[:, start : start + size]
        start += size
        with torch.no_grad():
            model(part, past_key_values=cache)
            window = state.open(memory.addresses.open(part, lookback=0))
            pending, tails = memory.start_window(window), {}
            for index, layer in enumerate(released.layers):
                assert torch.equal(pending.rows_LBTH[index], watch.rows[layer][step])
                fused = fuses[layer](
                    watch.hidden[layer][step], pending.wait(layer), window, state.tails.get(layer)
                )
                tails[layer] = fused.tail_BWSD
                torch.testing.assert_close(
                    fused.update_BTSD, watch.update[layer][step], **TOLERANCE
                )
            state.commit(window, tails)


def test_left_padding_reads_and_gives_what_theirs_does(model, released, watch, ids):
    mask = torch.ones_like(ids)
    mask[1, :4], mask[2, :17] = 0, 0
    with torch.no_grad():
        model(ids, attention_mask=mask)
        pending = memory_of(released).start(ids, padding=mask == 0)
        for index, layer in enumerate(released.layers):
            kept = mask.bool()
            assert torch.equal(pending.rows_LBTH[index][kept], watch.rows[layer][0][kept])
            update = released.fuse(layer)(
                watch.hidden[layer][0], pending.wait(layer), pending.window, mask_BT=kept
            ).update_BTSD
            torch.testing.assert_close(update[kept], watch.update[layer][0][kept], **TOLERANCE)


def test_our_own_model_trains_with_this_family():
    """The rules and norms are options of any model: zero-centred weights start as no-op scales."""
    memory = MemoryConfig(
        specification=Specification(
            layers=(0, 2),
            rows_per_head=(50, 50),
            heads=2,
            pad_id=1,
            rows_multiple=128,
            canonical_rule="raw",
            multiplier_rule="splitmix64",
            boundary_rule="eos",
        ),
        head_dim=8,
        fusion=FusionConfig(zero_centered_norms=True),
    )
    model = EngramLMForCausalLM(tiny_config(memory=memory.to_dict()))
    model.set_canonical_map(CanonicalMap.identity(97))
    fuse = model.model.layers[0].engram
    assert not fuse.query_norm_weight.any() and torch.equal(
        fuse.norm_weight_SD, torch.ones_like(fuse.norm_weight_SD)
    )
    tokens = torch.randint(2, 97, (2, 19))
    model(tokens, labels=tokens).loss.backward()
    assert fuse.query_norm_weight.grad.any() and fuse.key_norm_weight.grad.any()
    assert model.model.tables["0"].row_gradient is not None
    assert len(model.model.tables["0"].weight) % 128 == 0


def test_the_released_size_is_the_preset(tmp_path):
    record = {
        "vocab_size": 248_320,
        "hidden_size": 2560,
        "eos_token_id": 248_044,
        "ple_layer_ids": [2],
    }
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert Released(tmp_path).memory == qwen4_exp()


def test_a_table_in_many_shards_costs_one_look_at_each_files_header(released, monkeypatch):
    _, (regions,) = released.parts(1)
    assert len(regions) > 1 and len({region.path for region in regions}) == 1
    looks, read = [], released_module.read_header
    monkeypatch.setattr(
        released_module, "read_header", lambda path: looks.append(path) or read(path)
    )
    released.parts(1)
    assert looks == [regions[0].path]
