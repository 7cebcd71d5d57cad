"""The shipped corpus: its files are the recorded ones, its splits do not leak, its ids decode."""

import hashlib
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from engram_lm import corpus
from engram_lm.errors import DataError

ASSETS = corpus.tokenizer_file().parent


@pytest.fixture(scope="module")
def train() -> list[str]:
    return corpus.documents("train")


@pytest.fixture(scope="module")
def validation() -> list[str]:
    return corpus.documents("validation")


def in_words(text: str) -> str:
    return f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "


def meaning(document: str) -> str | None:
    """The definition in a document's first sentence, where its end can be told from the text."""
    if called := re.match(r"(?:In [^,:]+, )?([^.:]+) is called [^.:]+\.", document):
        return called[1]
    told = re.match(
        r"[^:.]*?(?:: | means (?:to )?| refers to | is (?:to )?| was )([^.]+)\.", document
    )
    return told[1] if told else None


def held_by(meanings: set[str], documents: list[str]) -> set[str]:
    """Those of `meanings`, given in words, that some document contains."""
    texts = [in_words(document) for document in documents]
    counts = Counter(word for text in texts for word in text.split())
    by_rarest: dict[str, list[str]] = defaultdict(list)
    for each in meanings:
        by_rarest[min(each.split(), key=counts.__getitem__)].append(each)
    return {
        each
        for text in texts
        for word in by_rarest.keys() & set(text.split())
        for each in by_rarest[word]
        if each in text
    }


def test_every_file_has_the_checksum_that_the_readme_records():
    readme = (ASSETS / "README.md").read_text(encoding="utf-8")
    recorded = dict(re.findall(r"\| (\S+) \| `([0-9a-f]{64})` \|", readme))
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in ASSETS.iterdir()
        if path.name != "README.md"
    }
    assert recorded == found
    assert len(found) == 4


def test_there_is_one_document_for_each_synset(train, validation):
    assert len(train) + len(validation) == 117_659
    assert len(set(train) | set(validation)) > 117_000
    assert 0.015 < len(validation) / 117_659 < 0.025


def test_a_document_is_one_clean_line(train, validation):
    for document in train + validation:
        assert document == " ".join(document.split())
        assert document
        assert document[-1] in '.!?")'


def test_no_train_document_holds_the_meaning_of_a_validation_document(train, validation):
    # Shorter ones may be cut short by a full stop inside, and then say nothing.
    meanings = {in_words(m) for m in map(meaning, validation) if m and len(m) >= 30}
    assert len(meanings) > 1_500
    assert held_by(meanings, train) == set()
    planted = "So it is said: " + meaning(validation[0]) + ", among other things."
    assert held_by({in_words(meaning(validation[0]))}, [*train[:99], planted])


def test_the_tokenizer_has_8192_ids_and_two_specials():
    tokenizer = corpus.tokenizer()
    assert len(tokenizer) == tokenizer.vocab_size == 8_192
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id == 1
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|pad|>"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces, a tab\t and\r\nlines\n\n",
        "Zürich, naïve café, Ångström; e\u0301 stays apart from é",
        "नमस्ते 世界 🜁👩🏽‍🚀 \u200b\u0000\ufeff",
        "Don't change: this , or this ! <pad> [MASK]",
    ],
)
def test_the_tokenizer_gives_back_any_text(text):
    tokenizer = corpus.tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert corpus.token_bytes()[ids].sum() == len(text.encode())


def test_tokens_are_the_documents_behind_their_separators(validation):
    tokens = corpus.tokens("validation", seed=3)
    text = corpus.tokenizer().decode(tokens.ids.tolist())
    assert tokens.ids.dtype == np.uint16
    assert text.startswith("<|endoftext|>")
    assert sorted(text.split("<|endoftext|>")[1:]) == sorted(validation)
    assert tokens.bytes == sum(len(document.encode()) for document in validation)
    assert tokens.bytes == corpus.token_bytes()[tokens.ids].sum()


def test_a_limit_gives_the_start_of_the_whole_stream():
    whole = corpus.tokens("validation", seed=1)
    for limit in (1, 4_001, len(whole.ids), 10**6):
        part = corpus.tokens("validation", limit, seed=1)
        assert np.array_equal(part.ids, whole.ids[:limit])
        assert part.bytes == corpus.token_bytes()[part.ids].sum()


def test_a_limit_encodes_little_more_than_it_returns():
    seen: list[int] = []
    tokens = corpus.tokens("train", 150_000, progress=seen.append)
    assert len(tokens.ids) == seen[-1] == 150_000
    assert seen == sorted(seen)
    assert len(seen) == 2


def test_the_seed_alone_decides_the_order():
    first, again, other = (corpus.tokens("validation", 5_000, seed=seed).ids for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_recorded_counts_are_the_counts_of_the_files(validation):
    readme = (ASSETS / "README.md").read_text(encoding="utf-8")
    row = re.search(r"\| validation \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", readme)
    documents, size, ids = (int(count.replace(",", "")) for count in row.groups())
    tokens = corpus.tokens("validation")
    assert (documents, size, ids) == (len(validation), tokens.bytes, len(tokens.ids))


@pytest.mark.parametrize(
    ("request_tokens", "message"),
    [
        (lambda: corpus.documents("test"), "split='test': the corpus has 'train' and 'validation'"),
        (lambda: corpus.tokens("validation", 0), "limit=0: ask for 1 token or more"),
    ],
    ids=["split", "no tokens"],
)
def test_a_request_that_cannot_be_served_is_refused_in_one_line(request_tokens, message):
    with pytest.raises(DataError, match=re.escape(message)) as refusal:
        request_tokens()
    assert "\n" not in str(refusal.value)
