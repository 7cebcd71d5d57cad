"""What analyses read: names, bytes, documents."""

import json

import pytest

from engram_lm import corpus
from engram_lm.analysis.material import Material, Sizes, encoded, name_ends, read, wordnet
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.rendering import tokenizer_of
from engram_lm.evaluate.suites.needles import Needles


def test_names_end_where_two_capitalised_words_do(tokenizer):
    text = "The king of Macedon, Alexander the Great, saw New York City; he left. Big Ben rang."

    def named(text: str) -> list[str]:
        encoding = tokenizer(text, return_offsets_mapping=True)
        ends = name_ends(text, encoding["offset_mapping"])
        return [
            text[: end[1]].split()[-1]
            for end, is_name in zip(encoding["offset_mapping"], ends, strict=True)
            if is_name
        ]

    # Neither one capitalised word, nor the beginning of a sentence, where all words have one.
    assert named(text) == ["Great", "City"]
    assert named("亚历山大大帝 saw nobody") == []


def test_bytes_are_those_of_the_text_of_each_token(tokenizer):
    texts = ["Zürich, 世界 👩🏽‍🚀", "a b"]
    made = encoded(((text, True) for text in texts), tokenizer)
    assert made["bytes_T"].sum() == sum(len(text.encode()) for text in texts)
    assert (made["bytes_T"][made["ids_T"] == 0] == 0).all()
    cut = encoded(((text, True) for text in texts), tokenizer, 4)
    assert all((cut[name] == made[name][:4]).all() for name in made)
    parts = encoded([("a ", True), ("b", False)], tokenizer)
    assert (parts["ids_T"] == 0).sum() == 1


def test_wordnet_is_read_as_the_demo_reads_it(tokenizer):
    made = wordnet(tokenizer, Sizes(tokens=256, context=64, corpus_tokens=5_000))
    assert (made.corpus_C == corpus.tokens("train", 5_000, seed=0).ids).all()
    assert len(made.ids_T) == 257 and made.windows_NT.shape == (4, 65)
    assert (made.stream_T == made.ids_T).all()
    assert made.stream_bytes == corpus.token_bytes()[made.ids_T[1:]].sum()


def test_a_file_is_read_by_documents_and_its_first_lines_are_shown(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {n}\n\nmore"}) + "\n" for n in range(9)))
    made = read(path, tokenizer, Sizes(tokens=64, context=16))
    assert made.text == "a.jsonl" and made.corpus_C is None
    assert made.sentences[:3] == ("line 0", "more", "line 1") and len(made.sentences) == 8
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(DataError, match=r"none\.txt: no text"):
        read(tmp_path / "none.txt", tokenizer, Sizes())
    with pytest.raises(DataError, match="two windows of context=16"):
        Material(text="t", **encoded([("a", True)], tokenizer), context=16).windows_NT  # noqa: B018
    unknowing = tokenizer_of(Needles(length=90))
    with pytest.raises(DataError, match="no token for part of 'New York'"):
        encoded([("New York", True)], unknowing)
    with pytest.raises(ConfigError, match="context=4"):
        Sizes(context=4)
