"""Every store gives the same bits for the same rows, whatever it is made of and whoever asks."""

import threading

import pytest
import torch
from stores import (
    FORMATS,
    PARAMETERS,
    PLAIN,
    STORES,
    cached,
    changed,
    claim_same_bits,
    content,
    disk,
    zipf,
)

from engram_lm.errors import AddressError, ConfigError, DataError
from engram_lm.memory.rows import RowFormat
from engram_lm.memory.table import Table
from engram_lm.store.cache import Cache
from engram_lm.store.overlay import Overlay
from engram_lm.store.resident import Resident
from engram_lm.store.sets import PROBATION, WAYS

SMALL = RowFormat(dtype=torch.float32, dim=4)


def made(make, format, directory, rows=3000):
    bytes_VR = content(format, rows)
    return make(bytes_VR, format, directory), bytes_VR


@pytest.mark.parametrize(
    ("make", "format"),
    [
        pytest.param(make, format, id=f"{make.__name__}-{name}")
        for name, format in FORMATS.items()
        for make in STORES
        if format.scale_group is None or make not in PARAMETERS
    ],
)
def test_every_store_returns_the_same_bits(make, format, tmp_path):
    store, bytes_VR = made(make, format, tmp_path, rows=400)
    with store:
        assert (store.rows, store.format) == (len(bytes_VR), format)
        claim_same_bits(store, bytes_VR)  # hints dropped
        for size in (0, 24, 300):
            rows_M, others_M = zipf(400, size), zipf(400, size)
            store.prefetch(rows_M)
            store.prefetch(others_M)  # gathered never
            assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])
        every_V = torch.arange(len(bytes_VR))
        assert torch.equal(store.gather(every_V), bytes_VR)
        assert torch.equal(store.gather(every_V.flip(0)), bytes_VR.flip(0))


@pytest.mark.parametrize("make", STORES, ids=lambda make: make.__name__)
def test_a_row_that_is_not_there_is_named(make, tmp_path):
    store, bytes_VR = made(make, SMALL, tmp_path, rows=99)
    with store:
        for row in (-1, 99, 2**40):
            with pytest.raises(AddressError, match=rf"row {row} .* position 1: .* 0 to 98"):
                store.gather(torch.tensor([98, row, 0, -5]))
        claim_same_bits(store, bytes_VR)


@pytest.mark.parametrize(
    "make", [s for s in STORES if s.__name__ != "table"], ids=lambda m: m.__name__
)
def test_a_closed_store_says_so(make, tmp_path):
    store, _ = made(make, SMALL, tmp_path, rows=99)
    rows_M = torch.tensor([1])
    store.gather(rows_M)
    store.close()
    store.close()
    with pytest.raises(DataError, match="is closed: its rows cannot be read any more"):
        store.gather(rows_M)


def test_a_table_stays_readable_for_its_owner_after_closing():
    with Table(5, 2) as table:
        pass
    assert table.gather(torch.tensor([4])).shape == (1, 8)


def run(workers) -> None:
    threads = [threading.Thread(target=worker) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("make", STORES, ids=lambda make: make.__name__)
def test_concurrent_readers_get_the_same_bits(make, tmp_path):
    store, bytes_VR = made(make, SMALL, tmp_path)
    requests = [zipf(3000, 400) for _ in range(60)]
    wrong, answered = [], []

    def reader(index):
        for rows_M in requests[index::6]:
            if index % 2:
                store.prefetch(rows_M)
            if not torch.equal(store.gather(rows_M), bytes_VR[rows_M]):
                wrong.append(rows_M)
            answered.append(rows_M)

    with store:
        run([lambda i=i: reader(i) for i in range(6)])
    assert len(answered) == 60 and not wrong


@pytest.mark.parametrize(
    "make", [s for s in STORES if s.__name__ != "table"], ids=lambda m: m.__name__
)
def test_closing_under_readers_gives_right_rows_or_a_refusal(make, tmp_path):
    store, bytes_VR = made(make, SMALL, tmp_path)
    began, ends = threading.Barrier(5), []

    def reader():
        rows_M = zipf(3000, 2000)
        assert torch.equal(store.gather(rows_M), bytes_VR[rows_M])
        began.wait()
        try:
            while True:
                store.prefetch(rows_M)
                if not torch.equal(store.gather(rows_M), bytes_VR[rows_M]):
                    ends.append("wrong bits")
                    return
        except DataError as refusal:
            ends.append("closed" if "is closed" in str(refusal) else str(refusal))

    def closer():
        began.wait()
        store.close()

    run([*[reader] * 4, closer])
    assert ends == ["closed"] * 4


def test_stores_plug_in_beside_the_table(tmp_path):
    from test_table import memory_of

    table = Table(11 + 13, 4)
    bytes_VR = table.weight.detach().view(torch.uint8)
    ids_BT = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        wanted = memory_of(table).start(ids_BT).wait(0)
    for make in (*PLAIN[1:], cached(changed(disk))):
        with make(bytes_VR, table.format, tmp_path) as store:
            assert torch.equal(memory_of(store).start(ids_BT).wait(0), wanted)


class Watched(Resident):
    """Writes down what is asked of it."""

    def __init__(self, bytes_VR, format):
        super().__init__(bytes_VR, format)
        self.asked, self.hinted = [], []

    def gather(self, rows_M):
        self.asked.append(rows_M)
        return super().gather(rows_M)

    def prefetch(self, rows_M):
        self.hinted.append(rows_M)


def test_a_cache_asks_for_missing_rows_once_and_keeps_them():
    bytes_VR = content(SMALL, 500)
    slower = Watched(bytes_VR, SMALL)
    cache = Cache(slower, 2**20)
    rows_M = torch.tensor([7, 400, 7, 3])
    cache.gather(rows_M)
    cache.prefetch(torch.tensor([400, 5, 7]))
    cache.gather(torch.tensor([7, 5, 5, 3]))
    cache.gather(torch.tensor([5, 400]))
    assert [rows.tolist() for rows in slower.asked] == [[3, 7, 400], [5]]
    assert [rows.tolist() for rows in slower.hinted] == [[5]]
    assert (cache.asked, cache.hits) == (10, 4)


def test_a_cache_as_large_as_the_table_keeps_it_all():
    bytes_VR = content(SMALL, 1003)
    slower = Watched(bytes_VR, SMALL)
    cache = Cache(slower, 2**20)
    for rows_M in torch.randperm(1003).split(100):
        cache.gather(rows_M)
    reads = len(slower.asked)
    claim_same_bits(cache, bytes_VR)
    assert len(slower.asked) == reads


@pytest.mark.parametrize("budget", [32 * 16, 32 * 16 * 3 + 31, 10_000])
def test_a_cache_keeps_to_its_budget_and_drops_what_was_used_longest_ago(budget):
    bytes_VR = content(SMALL, 5000)
    cache = Cache(Watched(bytes_VR, SMALL), budget)
    kept = cache._sets.bytes_PR.nbytes + cache._sets.tags_SW.nbytes + cache._sets.used_SW.nbytes
    assert budget - 32 * WAYS < kept <= budget
    same_set = torch.arange(WAYS + 4) * cache._sets.count
    for row in same_set.tolist():
        cache.gather(torch.tensor([0, row]))  # row 0 is used all the time
    hit = cache._sets.here(same_set.numpy())
    assert hit.tolist() == [True] + [False] * 4 + [True] * (WAYS - 1)


def test_rows_found_again_outlive_a_flood_of_new_ones_but_not_others_found_again():
    slower = Watched(content(SMALL, 5000), SMALL)
    cache = Cache(slower, 32 * WAYS)
    assert cache._sets.count == 1
    first, second, new = torch.arange(0, 12), torch.arange(100, 112), torch.arange(200, 400)
    assert len(first) == WAYS - PROBATION

    def missed(rows_M: torch.Tensor) -> int:
        before = cache.hits
        cache.gather(rows_M)
        return len(rows_M) - (cache.hits - before)

    def brought(rows_M: torch.Tensor) -> None:
        for _ in range(2):
            for part in rows_M.split(PROBATION):
                cache.gather(part)
                cache.gather(part)

    brought(first)
    for row in new.split(1):
        cache.gather(row)
    assert missed(first) == 0
    brought(second)
    for row in new.split(1):
        cache.gather(row)
    assert missed(second) == 0
    assert missed(first) == 12


def test_more_new_rows_than_a_set_holds_are_answered_and_partly_kept():
    bytes_VR = content(SMALL, 5000)
    cache = Cache(Watched(bytes_VR, SMALL), 32 * 16 * 4)
    rows_M = torch.arange(0, 5000, cache._sets.count)
    for _ in range(3):
        assert torch.equal(cache.gather(rows_M), bytes_VR[rows_M])
    assert cache.hits > 0
    tags = cache._sets.tags_SW[cache._sets.tags_SW >= 0]
    assert len(set(tags.tolist())) == len(tags) <= WAYS


def test_a_budget_too_small_for_a_set_is_refused():
    with pytest.raises(ConfigError, match=r"budget_bytes=511: at least 512 are needed for 16 rows"):
        Cache(Resident(content(SMALL, 9), SMALL), 511)


def test_an_overlay_never_reads_what_is_changed():
    base = Watched(content(SMALL, 50), SMALL)
    overlay = Overlay(base, torch.tensor([9, 2]), content(SMALL, 2))
    overlay.prefetch(torch.tensor([2, 9, 1]))
    overlay.gather(torch.tensor([2, 1, 9, 2]))
    assert [rows.tolist() for rows in (*base.hinted, *base.asked)] == [[1], [1]]
    nothing = Overlay(base, torch.tensor([], dtype=torch.int64), content(SMALL, 0))
    assert torch.equal(nothing.gather(torch.tensor([49, 0])), base.bytes_VR[[49, 0]])


def test_changed_rows_that_do_not_fit_the_base_are_refused():
    base, two = Resident(content(SMALL, 50), SMALL), content(SMALL, 2)
    with pytest.raises(DataError, match="row 4 is changed twice"):
        Overlay(base, torch.tensor([4, 4]), two)
    with pytest.raises(AddressError, match="row 50 .* rows 0 to 49"):
        Overlay(base, torch.tensor([4, 50]), two)
    with pytest.raises(DataError, match=r"1 changed rows as torch.uint8 \(2, 16\)"):
        Overlay(base, torch.tensor([4]), two)
