"""Rows shared by a corpus's n-grams: against counting in Python, planted ones, and the formulas."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, canonical_map

from engram_lm import Specification, corpus
from engram_lm.analysis import row_sharing
from engram_lm.analysis.row_sharing import RowSharing
from engram_lm.errors import DataError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses


def addresses(rows: int = 50, heads: int = 2) -> Addresses:
    specification = Specification(
        layers=(0, 2), rows_per_head=(rows, rows), heads=heads, pad_id=1, boundary_rule="cross"
    )
    return Addresses(specification, canonical_map())


@pytest.mark.parametrize("order", [2, 3])
def test_sharers_are_those_that_python_counts(order, monkeypatch):
    monkeypatch.setattr(row_sharing, "CHUNK", 37)  # so that n-grams reach over chunks
    known = addresses()
    ids = np.random.default_rng(0).integers(2, VOCABULARY, 300)
    found = RowSharing(known, ids, 2, order)
    rows = known.rows(torch.from_numpy(ids)[None])[1, 0].numpy()
    canonical = known.canonical.ids_V.numpy()[ids]
    columns = range((order - 2) * 2, (order - 1) * 2)
    readers: dict[tuple[int, int], set] = defaultdict(set)
    for end in range(order - 1, len(ids)):
        ngram = tuple(canonical[end - order + 1 : end + 1])
        for head in columns:
            readers[head, rows[end, head]].add(ngram)
    wanted = [[len(readers[head, row[head]]) for head in columns] for row in rows[order - 1 :]]
    assert found.of(rows[order - 1 :, list(columns)]).tolist() == wanted
    ngrams = {tuple(canonical[e - order + 1 : e + 1]) for e in range(order - 1, len(ids))}
    summary = found.summary()
    assert summary.distinct == len(ngrams)
    for head, one in zip(columns, summary.heads, strict=True):
        read = [known for (at, _), known in readers.items() if at == head]
        assert one.untouched == one.rows - len(read) and one.most == max(map(len, read))
        assert one.shared == sum(len(k) for k in read if len(k) > 1) / len(ngrams)


@pytest.mark.parametrize("rule", ["document", "eos"])
@pytest.mark.parametrize("order", [2, 3])
def test_ngrams_are_those_that_the_boundary_rule_addresses(rule, order, monkeypatch):
    monkeypatch.setattr(row_sharing, "CHUNK", 5)  # so that documents reach over chunks
    plain = addresses()
    known = Addresses(replace(plain.specification, boundary_rule=rule), plain.canonical)
    drawn = np.random.default_rng(1)
    ids = drawn.integers(2, VOCABULARY, 200)
    starts = drawn.random(200) < 0.2
    if rule == "eos":
        ids[starts] = known.specification.pad_id
        begins = np.concatenate([[False], starts[:-1]])  # the separator ends its document
    else:
        begins = starts
    found = RowSharing(known, ids, 2, order, starts)
    canonical_V = known.canonical.ids_V.numpy()
    pad, readers = canonical_V[known.specification.pad_id], defaultdict(set)
    given = torch.from_numpy(starts)[None]
    rows = known.rows(torch.from_numpy(ids)[None], document_starts=given)[1, 0].numpy()
    columns = list(range((order - 2) * 2, (order - 1) * 2))
    for end in range(order - 1, len(ids)):
        first = max((at for at in range(end + 1) if begins[at]), default=0)
        ngram = tuple(
            canonical_V[ids[at]] if at >= first else pad for at in range(end - order + 1, end + 1)
        )
        for head in columns:
            readers[head, rows[end, head]].add(ngram)
    wanted = [[len(readers[head, row[head]]) for head in columns] for row in rows[order - 1 :]]
    assert found.of(rows[order - 1 :, columns]).tolist() == wanted
    crossing = RowSharing(plain, ids, 2, order, starts)  # which heeds no document
    # A bigram behind an EOS holds that as its pad: there alone the two rules agree.
    assert (found.distinct < crossing.distinct) == ((rule, order) != ("eos", 2))


def test_a_planted_collision_is_found_and_told_from_one_in_a_single_head():
    known = addresses(rows=11)
    every = torch.cartesian_prod(torch.arange(2, VOCABULARY), torch.arange(2, VOCABULARY))
    rows_of = {
        tuple(pair): rows for pair, rows in zip(every.tolist(), heads(known, every), strict=True)
    }
    first = (2, 3)

    def planted(collides: tuple[bool, bool]) -> list[int]:
        """Both pairs in a row, such that the pair between them shares no row with either."""
        for other, rows in rows_of.items():
            between = rows_of[first[1], other[0]]
            alone = not any(between[h] in (rows[h], rows_of[first][h]) for h in (0, 1))
            same = tuple(rows[h] == rows_of[first][h] for h in (0, 1))
            if alone and same == collides and canonical(known, other) != canonical(known, first):
                return [*first, *other]
        raise AssertionError("no such pair")

    for collides in ((True, True), (True, False), (False, True)):
        ids = np.array(planted(collides))
        ends = known.rows(torch.from_numpy(ids)[None])[0, 0, [1, 3], :2].numpy()
        assert RowSharing(known, ids, 0, 2).of(ends).tolist() == [[1 + c for c in collides]] * 2


def heads(known: Addresses, pairs: torch.Tensor) -> list[list[int]]:
    """Layer 0's rows of order 2."""
    return known.rows(pairs)[0, :, 1, :2].tolist()


def canonical(known: Addresses, pair: tuple[int, int]) -> list[int]:
    return known.canonical.ids_V[list(pair)].tolist()


def test_what_is_counted_on_text_is_what_chance_gives():
    tokenizer = corpus.tokenizer()
    specification = Specification(
        layers=(1,), rows_per_head=(9_000, 9_000), heads=4, pad_id=1, boundary_rule="cross"
    )
    known = Addresses(specification, CanonicalMap.from_tokenizer(tokenizer))
    ids = corpus.tokens("validation", 20_000).ids
    for order in (2, 3):
        found = RowSharing(known, ids, 1, order).summary()
        for head in found.heads:
            # Binomial counts of some thousand: 4 standard deviations are under 5 % of them.
            assert head.shared == pytest.approx(head.shared_expected, rel=0.05)
            assert head.untouched == pytest.approx(head.untouched_expected, rel=0.05)
            assert head.load == found.distinct / head.rows
        assert found.every_head == pytest.approx(found.every_head_expected, rel=0.15)


def test_too_few_ids_are_refused():
    with pytest.raises(DataError, match="2 token ids: an n-gram of order 3"):
        RowSharing(addresses(), np.array([2, 3]), 0, 3)
