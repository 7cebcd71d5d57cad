"""Token ids -> row numbers, against recorded values and against Python integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.config import deepseek_v41
from engram_lm.errors import AddressError, ConfigError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.specification import Specification
from engram_lm.memory.window import EMPTY


def demo_addresses(record, canonical) -> Addresses:
    specification = Specification(
        layers=tuple(record["layer_ids"]),
        rows_per_head=tuple(record["engram_vocab_size"]),
        heads=record["n_head_per_ngram"],
        seed=record["seed"],
        pad_id=record["pad_id"],
    )
    return Addresses(specification, canonical)


def test_demo_rows_equal_the_recorded_ones(golden, deepseek):
    for record in golden("demo_hash.json"):
        addresses = demo_addresses(record, deepseek)
        for case in record["cases"]:
            rows = addresses.rows(torch.tensor([case["token_ids"]], dtype=torch.int64))
            for layer, rows_TH in zip(addresses.layers, rows[:, 0], strict=True):
                offsets = torch.tensor(addresses.specification.offsets(layer))
                assert (rows_TH - offsets).tolist() == case["heads"][str(layer)]


def test_demo_canonical_ids_equal_the_recorded_ones(golden, deepseek):
    for record in golden("demo_hash.json"):
        assert deepseek.canonical_ids == record["canonical_vocab"]
        for case in record["cases"]:
            ids = deepseek.ids_V[torch.tensor(case["token_ids"], dtype=torch.int64)]
            assert ids.tolist() == case["canonical_ids"]


def test_deepseek_v41_rows_equal_the_recorded_ones(golden, deepseek):
    record = golden("deepseek_v41_rows.json")
    addresses = Addresses(deepseek_v41().specification, deepseek)
    for case in record["cases"]:
        ids = torch.tensor([case["token_ids"]], dtype=torch.int64)
        masked = torch.zeros_like(ids, dtype=torch.bool)
        masked[0, case.get("masked_positions", [])] = True
        rows = addresses.rows(ids, masked=masked)
        for layer, rows_TH in zip(addresses.layers, rows[:, 0], strict=True):
            assert rows_TH.tolist() == case["rows"][str(layer)]


@pytest.mark.gpu
def test_rows_on_a_gpu_equal_those_on_the_cpu(deepseek):
    addresses = Addresses(deepseek_v41().specification, deepseek)
    ids = torch.randint(0, 129_280, (3, 257))
    assert torch.equal(addresses.rows(ids.cuda()).cpu(), addresses.rows(ids))


# What follows compares with the definition, written with Python's unbounded integers and no
# vector operation: one token at a time, looking back one step after another.


class Sequence:
    """One sequence as a list of (token id or None, opens a document); None blocks look-back."""

    def __init__(self, addresses: Addresses) -> None:
        self.addresses = addresses
        self.specification = addresses.specification
        self.canonical = addresses.canonical.ids_V.tolist()
        self.seen: list[tuple[int | None, bool]] = []

    def push(self, token_id: int | None, opens: bool = False) -> list[list[int]]:
        self.seen.append((token_id, opens))
        return [self._rows(layer) for layer in self.specification.layers]

    def _rows(self, layer: int) -> list[int]:
        specification, offset, rows, mix = self.specification, 0, [], 0
        blocked, back = False, 0
        for order in range(1, specification.max_order + 1):
            back = order - 1
            token = self.seen[-1 - back][0] if back < len(self.seen) else None
            if back and specification.boundary_rule == "document" and not blocked:
                blocked = self.seen[-back][1]
            if back and specification.boundary_rule == "eos":
                blocked = blocked or token == specification.pad_id
            blocked = blocked or token is None
            value = self.canonical[specification.pad_id if blocked else token]
            product = value * specification.multipliers[layer][back]
            if value < specification.vocabulary.canonical_ids:
                assert product < 2**63  # the bound that makes int64 enough
            mix ^= product % 2**63
            if order >= 2:
                for prime in specification.primes[layer][order - 2]:
                    rows.append(mix % prime + offset)
                    offset += prime
        return rows


@st.composite
def cases(draw):
    token_ids = draw(st.sampled_from([3, 50, 700]))
    rule = draw(st.sampled_from(["folded", "raw"]))
    classes = draw(st.integers(1, token_ids)) if rule == "folded" else token_ids
    canonical = [i % classes for i in range(token_ids)]
    orders = draw(st.integers(1, 4))
    specification = Specification(
        layers=tuple(sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=3)))),
        rows_per_head=tuple(draw(st.integers(2, 10**6)) for _ in range(orders)),
        heads=draw(st.integers(1, 3)),
        seed=draw(st.sampled_from([0, 1, 17, 2**63 - 1])),
        pad_id=draw(st.integers(0, token_ids - 1)),
        canonical_rule=rule,
        multiplier_rule=draw(st.sampled_from(["pcg64", "splitmix64"])),
        boundary_rule=draw(st.sampled_from(["cross", "document", "eos"])),
    )
    size = token_ids + draw(st.sampled_from([0, 1, 40, 5000]))  # a padded or grown vocabulary
    addresses = Addresses(specification, CanonicalMap(torch.tensor(canonical)).grown(size))
    B, T = draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2, 3, 5, 8, 13]))
    H = draw(st.integers(0, 6))
    ids = st.one_of(st.integers(0, token_ids - 1), st.integers(0, size - 1))

    def matrix(elements, width):
        return [[draw(elements) for _ in range(width)] for _ in range(B)]

    return (
        addresses,
        matrix(ids, T),
        matrix(st.one_of(ids, st.just(EMPTY)), H),
        *(matrix(st.sampled_from([False, False, True]), T) for _ in range(3)),
    )


def tensor(matrix, width, dtype) -> torch.Tensor:
    return torch.tensor(matrix, dtype=dtype).reshape(len(matrix), width)


def rows_of(case) -> torch.Tensor:
    addresses, ids, history, padding, masked, starts = case
    T = len(ids[0])
    return addresses.rows(
        tensor(ids, T, torch.int64),
        tensor(history, len(history[0]), torch.int64),
        padding=tensor(padding, T, torch.bool),
        masked=tensor(masked, T, torch.bool),
        document_starts=tensor(starts, T, torch.bool),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_rows_equal_python_integers_for_every_history_and_mask(case):
    addresses, ids, history, padding, masked, starts = case
    T, rows = len(ids[0]), rows_of(case)
    assert rows.dtype == torch.int64
    for b in range(len(ids)):
        sequence = Sequence(addresses)
        for token in history[b]:
            sequence.push(None if token == EMPTY else token)
        for t in range(T):
            if padding[b][t]:
                continue
            token = None if masked[b][t] else ids[b][t]
            assert rows[:, b, t].tolist() == sequence.push(token, starts[b][t])


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_chunks_with_history_read_the_rows_of_the_whole(case, data):
    addresses, ids, *_ = case
    whole = tensor(ids, len(ids[0]), torch.int64)
    cut = data.draw(st.integers(0, whole.shape[1]))
    parts = [addresses.rows(whole[:, :cut]), addresses.rows(whole[:, cut:], whole[:, :cut])]
    assert torch.equal(torch.cat(parts, dim=2), addresses.rows(whole))


def small(canonical: int = 10, **changes) -> Addresses:
    rules = {"layers": (0,), "rows_per_head": (100,), "heads": 1, "pad_id": 0, **changes}
    return Addresses(Specification(**rules), CanonicalMap(torch.arange(canonical)))


def test_ids_of_padding_and_image_tokens_are_not_looked_at():
    addresses = small()
    ids = torch.tensor([[99, -7, 3]])
    padding = torch.tensor([[True, False, False]])
    masked = torch.tensor([[False, True, False]])
    rows = addresses.rows(ids, padding=padding, masked=masked)
    assert torch.equal(rows[:, :, 2], addresses.rows(torch.tensor([[3]]))[:, :, 0])


@pytest.mark.parametrize("wrong", [-1, 10, 2**63 - 1, -(2**63)])
def test_an_id_outside_the_vocabulary_is_named_with_its_position(wrong):
    with pytest.raises(AddressError, match=rf"token id {wrong} at position 2 of sequence 1"):
        small().rows(torch.tensor([[0, 1, 2], [3, 4, wrong]]))


def test_a_history_id_outside_the_vocabulary_is_named():
    with pytest.raises(AddressError, match="history id 10 at position 1 of sequence 0"):
        small().rows(torch.tensor([[0]]), torch.tensor([[EMPTY, 10]]))


@pytest.mark.parametrize("ids", [torch.tensor([[0.0]]), torch.tensor([[True]]), torch.tensor([0])])
def test_ids_that_are_no_integers_or_no_batch_are_refused(ids):
    with pytest.raises(AddressError, match="token_ids"):
        small().rows(ids)


def test_histories_and_masks_of_another_shape_are_refused():
    ids = torch.tensor([[0, 1]])
    with pytest.raises(AddressError, match="1; one row each"):
        small().rows(ids, torch.tensor([[0], [1]]))
    with pytest.raises(AddressError, match="masked"):
        small().rows(ids, masked=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(AddressError, match="padding"):
        small().rows(ids, padding=torch.zeros(1, 2, dtype=torch.int64))


def test_a_pad_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="pad_id=10"):
        small(pad_id=10)
