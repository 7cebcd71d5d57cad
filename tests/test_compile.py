"""A compiled decode step equals the plain forward pass, is one graph, and is compiled once."""

import copy

import pytest
import torch
from tiny import phrases, trained_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

from engram_lm.memory.lookup import Memory

# Tracing an autograd function instantiates it, which torch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

TOLERANCE = 1e-4  # as in test_decoding
T, PROMPT = 23, 9


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return phrases(2, T, seed=99)


START_WINDOW = Memory.start_window
READ = {"rows": None}  # a place that a graph can write to: row numbers of the last call


def start_window(memory, window):
    pending = START_WINDOW(memory, window)
    READ["rows"] = pending.rows_LBTH
    return pending


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(Memory, "start_window", start_window)
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def stepwise(model, ids, forward, static: bool, padding: int = 0):
    """Logits and rows of a prompt and single tokens, and how many graphs each step compiled."""
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    options = {"max_cache_len": T} if static else {}
    cache = (StaticCache if static else DynamicCache)(config=model.config, **options)
    stops = [PROMPT, *range(PROMPT + 1, T + 1)]
    logits, rows, graphs = [], [], []
    for start, stop in zip([0, *stops], stops, strict=False):
        given = {"attention_mask": mask[:, :stop]} if padding else {}
        before = counters["stats"]["unique_graphs"]
        step = model if stop == PROMPT else forward
        logits.append(step(ids[:, start:stop], past_key_values=cache, **given).logits)
        rows.append(READ["rows"])
        graphs.append(counters["stats"]["unique_graphs"] - before)
    return torch.cat(logits, dim=1), torch.cat(rows, dim=2), graphs


def plain(model, ids):
    logits = model(ids, use_cache=False).logits
    return logits, READ["rows"]


@pytest.mark.parametrize(
    ("streams", "static"),
    [
        pytest.param(1, True, id="1-static"),
        pytest.param(4, False, id="4-dynamic"),
        pytest.param(1, False, id="1-dynamic", marks=pytest.mark.long),
        pytest.param(4, True, id="4-static", marks=pytest.mark.long),
    ],
)
def test_a_traced_decode_step_is_one_graph_that_serves_all_later_steps(ids, streams, static):
    model = trained_model(streams, True, 3)
    forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    logits, rows, graphs = stepwise(model, ids, forward, static)
    wanted = plain(model, ids)
    assert torch.equal(rows, wanted[1])
    assert (logits - wanted[0]).abs().max() < TOLERANCE
    # The first step, and with a growing cache a second one, where its length becomes a symbol.
    assert graphs[0] == 0 and graphs[1] == 1 and sum(graphs[2:]) == (0 if static else 1)
    assert not counters["graph_break"]


def test_a_traced_decode_step_of_a_padded_batch_equals_the_sequences_alone(ids):
    model = trained_model(1, True, 3)
    forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    logits, rows, _ = stepwise(model, ids, forward, static=False, padding=5)
    wanted = plain(model, ids[1:, 5:])
    assert torch.equal(rows[:, 1:, 5:], wanted[1])
    assert (logits[1, 5:] - wanted[0]).abs().max() < TOLERANCE


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it imports inductor
@pytest.mark.parametrize("streams", [1, 4])
def test_a_decode_step_compiled_to_machine_code_equals_the_plain_forward_pass(ids, streams):
    model = trained_model(streams, True, 3)
    forward = torch.compile(model.forward, fullgraph=True)
    logits, rows, graphs = stepwise(model, ids, forward, static=True)
    wanted = plain(model, ids)
    assert torch.equal(rows, wanted[1])
    assert (logits - wanted[0]).abs().max() < TOLERANCE
    assert sum(graphs) == 1


def test_generate_compiles_its_steps_with_a_static_cache_and_finds_the_same_text(ids):
    model = copy.deepcopy(trained_model(1, True, 3))  # generate keeps the compiled call on it
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    batch = ids.clone()
    batch[1, :6] = 1
    wanted = model.generate(batch, use_cache=False, **options)
    got = model.generate(batch, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(got, wanted)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
