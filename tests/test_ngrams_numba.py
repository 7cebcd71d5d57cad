"""Compiled addressing, against its plain twin and against Python integers: equality everywhere."""

import subprocess
import sys

import numpy as np
import pytest
import test_ngrams
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_ngrams import cases, tensor

from engram_lm.config import deepseek_v41, paper
from engram_lm.errors import AddressError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.ngrams_numba import POSITIONS_PER_THREAD, CompiledAddresses, _remainder
from engram_lm.memory.specification import Specification
from engram_lm.memory.window import EMPTY


def compiled(addresses: Addresses) -> CompiledAddresses:
    return CompiledAddresses(addresses.specification, addresses.canonical)


@pytest.mark.parametrize(
    "claim",
    [
        test_ngrams.test_demo_rows_equal_the_recorded_ones,
        test_ngrams.test_deepseek_v41_rows_equal_the_recorded_ones,
    ],
    ids=["demo", "deepseek_v41"],
)
def test_recorded_rows_are_read_by_the_compiled_path_too(claim, golden, deepseek, monkeypatch):
    monkeypatch.setattr(test_ngrams, "Addresses", CompiledAddresses)
    claim(golden, deepseek)


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(2, 2**49))
@example(2**63 - 1, 2)
@example(2**63 - 1, 3)
@example(2**63 - 1, 2**48 + 21)
@example(0, 2)
def test_the_remainder_is_that_of_python_up_to_the_largest_int64(mix, prime):
    # The quotient is rounded down: multiples of the prime and their neighbours are the hard ones.
    multiple = mix - mix % prime
    for value in (mix, multiple, multiple + prime - 1, max(0, multiple - 1)):
        if value < 2**63:
            numbers = np.array([value, prime, 2**64 // prime], dtype=np.uint64)
            assert _remainder(*numbers) == value % prime


@settings(max_examples=200, deadline=None)
@given(cases())
def test_rows_equal_the_twins_for_every_history_and_mask(case):
    addresses, ids, history, *masks = case
    T = len(ids[0])
    ids_BT = tensor(ids, T, torch.int64)
    padding, masked, starts = (tensor(mask, T, torch.bool) for mask in masks)
    for masks in ({}, {"padding": padding, "masked": masked, "document_starts": starts}):
        for history_BH in (None, tensor(history, len(history[0]), torch.int64)):
            rows = compiled(addresses).rows(ids_BT, history_BH, **masks)
            assert rows.dtype == torch.int64
            assert torch.equal(rows, addresses.rows(ids_BT, history_BH, **masks))


@pytest.mark.parametrize("boundary_rule", ["cross", "document"])
@pytest.mark.parametrize("orders", [1, 2, 3])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (3, 7), (1, 16), (2, 16), (7, 33)])
def test_rows_equal_the_twins_at_every_shape_and_order(shape, orders, boundary_rule):
    specification = Specification(
        layers=(0, 3, 9),
        rows_per_head=(2, 1000, 2**47)[:orders],
        heads=5,
        pad_id=699,
        boundary_rule=boundary_rule,
    )
    addresses = Addresses(specification, CanonicalMap(torch.arange(700)))
    ids_BT = torch.randint(650, 700, shape)  # the largest ids: mixes come close to 2^63
    starts = torch.rand(shape) < 0.2
    left = torch.arange(shape[1]).expand(shape) < torch.arange(shape[0])[:, None]
    for padding in (None, left, left.flip(1), torch.rand(shape) < 0.3):
        masks = {"padding": padding, "document_starts": starts}
        assert torch.equal(
            compiled(addresses).rows(ids_BT, **masks), addresses.rows(ids_BT, **masks)
        )


def test_a_window_that_is_longer_or_shorter_than_the_specification_needs_reads_the_same_rows():
    addresses = Addresses(
        Specification(layers=(0,), rows_per_head=(50, 50), heads=2, pad_id=0),
        CanonicalMap(torch.arange(10)),
    )
    ids_BT = torch.randint(0, 10, (2, 6))
    for lookback in (0, 1, 5):
        window = addresses.open(ids_BT, torch.tensor([[3, EMPTY, 4], [1, 2, 3]]), lookback=lookback)
        rows = compiled(addresses).window_rows(window)
        assert torch.equal(rows, addresses.window_rows(window))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_ids_of_other_types_and_strides_read_the_same_rows(dtype):
    specification = Specification(layers=(0,), rows_per_head=(50, 50), heads=2, pad_id=0)
    addresses = CompiledAddresses(specification, CanonicalMap(torch.arange(100)))
    ids_BT = torch.randint(0, 100, (6, 40), dtype=dtype)
    for strided in (ids_BT.T, ids_BT[::2, 1::3], ids_BT[:1].expand(4, 40)):
        assert torch.equal(addresses.rows(strided), addresses.rows(strided.long().contiguous()))


@pytest.mark.parametrize("tokens", [2, 2.3, 5])
def test_every_number_of_threads_writes_the_same_rows(deepseek, tokens):
    addresses = CompiledAddresses(paper().specification, deepseek)
    ids_BT = torch.randint(0, deepseek.token_ids, (1, int(tokens * POSITIONS_PER_THREAD)))
    before = torch.get_num_threads()
    try:
        rows = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows.append(addresses.rows(ids_BT))
    finally:
        torch.set_num_threads(before)
    twin = Addresses(paper().specification, deepseek).rows(ids_BT)
    assert all(torch.equal(rows_LBTH, twin) for rows_LBTH in rows)


def test_rows_of_one_call_are_not_touched_by_the_next():
    specification = Specification(layers=(0,), rows_per_head=(50,), heads=2, pad_id=0)
    addresses = CompiledAddresses(specification, CanonicalMap(torch.arange(100)))
    first = addresses.rows(torch.zeros(1, 9, dtype=torch.int64))
    kept = first.clone()
    addresses.rows(torch.ones(1, 9, dtype=torch.int64))
    assert torch.equal(first, kept)


def test_an_id_outside_the_vocabulary_is_named():
    specification = Specification(layers=(0,), rows_per_head=(50,), heads=2, pad_id=0)
    addresses = CompiledAddresses(specification, CanonicalMap(torch.arange(10)))
    with pytest.raises(AddressError, match="token id 10 at position 1 of sequence 0"):
        addresses.rows(torch.tensor([[0, 10]]))


@pytest.mark.gpu
def test_ids_on_a_gpu_read_the_same_rows_there(deepseek):
    addresses = CompiledAddresses(deepseek_v41().specification, deepseek)
    ids = torch.randint(0, 129_280, (3, 257))
    rows = addresses.rows(ids.cuda())
    assert rows.is_cuda
    assert torch.equal(rows.cpu(), addresses.rows(ids))


def test_numba_is_imported_only_when_asked_for_and_named_when_it_is_missing():
    code = (
        "import sys, engram_lm; engram_lm.Addresses; assert 'numba' not in sys.modules\n"
        "sys.modules['numba'] = None\n"
        "try: engram_lm.CompiledAddresses\n"
        "except engram_lm.ConfigError as error: assert 'engram-lm[fast]' in str(error)\n"
        "else: raise SystemExit('nothing was refused')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_that_are_held_are_never_written_over():
    addresses = CompiledAddresses(paper().specification, CanonicalMap.identity(129_280))
    held = []
    for seed in range(5):
        ids = torch.randint(129_280, (4, 2048), generator=torch.Generator().manual_seed(seed))
        rows = addresses.rows(ids)
        # Three ways of holding on: the tensor, a view of it, a NumPy array over it.
        held.append((ids, (rows, rows[1, 2], rows.numpy()[0, 1])[seed % 3]))
        del rows
        addresses.rows(ids.flip(0))  # nobody holds these
    for seed, (ids, kept) in enumerate(held):
        wanted = Addresses(paper().specification, CanonicalMap.identity(129_280)).rows(ids)
        wanted = (wanted, wanted[1, 2], wanted[0, 1])[seed % 3]
        assert torch.equal(torch.as_tensor(kept), wanted)


def test_memory_of_rows_that_nobody_holds_is_used_again():
    addresses = CompiledAddresses(paper().specification, CanonicalMap.identity(129_280))
    ids = torch.zeros(4, 2048, dtype=torch.int64)
    places = {addresses.rows(ids).data_ptr() for _ in range(6)}
    assert len(places) == 1
    assert addresses.rows(ids[:, :1500]).data_ptr() in places
