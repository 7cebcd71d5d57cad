"""New rows depend on seed and row number, not on how the table is cut."""

import pytest
import torch
from tiny import canonical_map, tiny_config

from engram_lm.errors import ConfigError
from engram_lm.memory.initial_rows import BLOCK, draw_rows
from engram_lm.memory.table import unallocated
from engram_lm.model import EngramLMForCausalLM
from engram_lm.train.sharded_table import shard_tables
from engram_lm.train.workers import Workers

ROWS = 2 * BLOCK + 5


def drawn(first: int, last: int, dtype=torch.float32, seed=(3, 0)) -> torch.Tensor:
    rows = torch.empty(last - first, 4, dtype=dtype)
    draw_rows(rows, first_row=first, std=0.02, seed=seed)
    return rows


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards_of_a_table_are_the_whole_table_bit_for_bit(shards):
    whole = drawn(0, ROWS)
    parts, first = [], 0
    for part in torch.arange(ROWS).chunk(shards):
        parts.append(drawn(first, first + len(part)))
        first += len(part)
    assert torch.equal(torch.cat(parts), whole)
    assert whole.std().item() == pytest.approx(0.02, rel=0.01)
    assert len(whole[:, 0].unique()) > 0.99 * ROWS  # blocks are not copies of each other


def test_a_grown_table_keeps_its_rows_and_another_seed_or_layer_has_others():
    assert torch.equal(drawn(0, ROWS), drawn(0, ROWS + 99)[:ROWS])
    assert torch.equal(drawn(0, 50, torch.bfloat16), drawn(0, 50).bfloat16())
    for other in ((3, 1), (4, 0)):
        assert not (drawn(0, 50) == drawn(0, 50, seed=other)).any()


def test_a_model_is_made_without_the_memory_of_its_tables_and_gets_drawn_rows():
    with unallocated():
        model = EngramLMForCausalLM(tiny_config())
    model.set_canonical_map(canonical_map())
    assert all(table.weight.is_meta for table in model.model.tables.values())
    with pytest.raises(ConfigError, match=r"model.tables.0 has no rows yet and seed=None"):
        shard_tables(model)
    shard_tables(model, seed=3)
    table = model.model.tables["2"]
    wanted = torch.empty_like(table.weight)
    draw_rows(wanted, first_row=0, std=0.02, seed=(3, 1))
    assert torch.equal(table.weight, wanted)
    ids = torch.randint(2, 97, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert len(table.row_gradient.rows_U) > 0


def test_a_worker_that_is_alone_has_everything():
    workers = Workers.join()
    assert (workers.rank, workers.size, workers.main) == (0, 1, True)
    assert workers.share(7) == range(7) and workers.grid(1) == (None, None)
    assert torch.equal(workers.sum(torch.ones(2)), torch.ones(2))


def test_shares_are_contiguous_and_differ_by_one_at_most():
    for total in range(12):
        shares = [Workers(rank, 5).share(total) for rank in range(5)]
        assert [i for share in shares for i in share] == list(range(total))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: with WORLD_SIZE=2 it is below 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1': a whole number"),
    ],
)
def test_a_half_set_environment_is_refused_by_name(environment, said, monkeypatch):
    if len(environment) == 2:
        environment |= {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        Workers.join()
