"""The rules of addressing as an object and as a file."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models

from engram_lm.config import deepseek_v41, demo, nano, paper, qwen4_exp
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.specification import Specification, Vocabulary


def by_layer(values) -> dict[str, list]:
    return {str(k): json.loads(json.dumps(v)) for k, v in values.items()}


def test_constants_equal_the_recorded_ones(golden, deepseek):
    records = [golden("deepseek_v41_rows.json"), golden("demo_hash.json")[0]]
    for preset, record in zip((deepseek_v41(), demo()), records, strict=True):
        specification = preset.specification.bind(deepseek)
        assert by_layer(specification.multipliers) == record["multipliers"]
        assert by_layer(specification.primes) == record["primes"]


def test_deepseek_v41_tables_have_the_released_number_of_rows(golden):
    config = golden("deepseek_v41_rows.json")["config"]
    specification = deepseek_v41().specification
    rows = [specification.table_rows(layer) for layer in specification.layers]
    assert rows == config["engram_num_embeddings"] == [384_006_168, 384_016_682]
    assert deepseek_v41().memory_dim == 6144


def test_qwen4_exp_has_the_constants_of_the_released_model():
    # As ports of Qwen3.8-Flash-Next carry them: one table, vocabulary 248,320, EOS 248,044.
    specification = qwen4_exp().specification
    assert specification.multipliers == {1: (23703573157769, 20109073645365, 8052911324071)}
    assert specification.primes[1][0][:3] == (20_000_003, 20_000_023, 20_000_033)
    assert specification.primes[1][1][-1] == 20_000_171
    assert specification.offsets(1)[-1] == 300_001_275
    assert specification.table_rows(1) == 320_001_536 and qwen4_exp().memory_dim == 2560


def test_paper_tables_have_the_papers_size():
    memory = paper()
    specification = memory.specification
    rows = sum(specification.table_rows(layer) for layer in specification.layers)
    assert memory.memory_dim == 1280
    assert abs(rows * memory.head_dim / 5.79e9 - 1) < 1e-3


def test_no_prime_is_used_twice():
    for preset in (paper(), demo(), deepseek_v41(), qwen4_exp(), nano()):
        primes = preset.specification.primes.values()
        heads = [prime for orders in primes for order in orders for prime in order]
        assert len(heads) == len(set(heads))


def test_a_specification_survives_its_file(tmp_path, deepseek):
    for specification in (
        paper().specification,
        deepseek_v41().specification.bind(deepseek),
        qwen4_exp().specification,
    ):
        specification.save(tmp_path / "spec.json")
        read = Specification.load(tmp_path / "spec.json")
        assert read == specification and read.digest == specification.digest


def test_numbers_past_2_to_53_survive_a_reader_that_keeps_doubles():
    canonical = CanonicalMap(torch.arange(7))  # a small vocabulary has multipliers near 2^60
    specification = replace(nano().specification, seed=2**63 - 1).bind(canonical)
    assert max(specification.multipliers[1]) > 2**53
    text = json.dumps(specification.to_dict())
    read = Specification.from_dict(json.loads(text, parse_int=lambda digits: int(float(digits))))
    assert read.multipliers == specification.multipliers and read.seed == 2**63 - 1


def test_every_rule_changes_the_digest(deepseek):
    base = nano().specification
    changes = {
        "layers": (1, 4),
        "rows_per_head": (4_000, 4_001),
        "heads": 7,
        "seed": 1,
        "pad_id": 2,
        "boundary_rule": "document",
        "rows_multiple": 128,
        "canonical_rule": "raw",
        "multiplier_rule": "splitmix64",
    }
    digests = {replace(base, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {base.digest, base.bind(deepseek).digest}) == len(changes) + 2


def test_a_written_file_may_use_plain_integers_but_no_floats():
    record = nano().specification.to_dict()
    del record["primes"]
    record["rows_per_head"] = [4000, 4000]
    assert Specification.from_dict(record) == nano().specification
    for name, value in (("rows_per_head", [4e3, 4000]), ("heads", 8.0), ("seed", "1e3")):
        with pytest.raises(ConfigError, match=name):
            Specification.from_dict({**record, name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "format"),
        ({"version": 1}, "version=1: this package reads version 2"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"multiplier_rule": "md5"}, "multiplier_rule='md5': accepted are pcg64"),
        ({"layers": 3}, "layers=3"),
        ({"vocabulary": {"token_ids": 1}}, "vocabulary="),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Specification.from_dict({**nano().specification.to_dict(), **change})


def test_edited_constants_are_refused(tmp_path, deepseek):
    record = nano().specification.bind(deepseek).to_dict()
    record["multipliers"]["1"][0] = str(int(record["multipliers"]["1"][0]) + 2)
    (tmp_path / "spec.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="spec.json: multipliers in the file differ"):
        Specification.load(tmp_path / "spec.json")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": ()},
        {"layers": (3, 1)},
        {"layers": (-1,)},
        {"rows_per_head": ()},
        {"rows_per_head": (1,)},
        {"heads": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"pad_id": -1},
        {"rows_multiple": 0},
        {"canonical_rule": "lower"},
        {"multiplier_rule": "md5"},
        {"prime_rule": "any"},
        {"boundary_rule": "never"},
    ],
)
def test_impossible_rules_are_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(nano().specification, **change)


def test_raw_ids_take_no_folded_map_and_no_larger_tokenizer(tmp_path):
    raw = replace(nano().specification, canonical_rule="raw")
    with pytest.raises(MismatchError, match="folds 3 ids into 2 is not the identity"):
        raw.bind(CanonicalMap(torch.tensor([0, 0, 1])))
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "A": 1, "b": 2}, unk_token="b"))
    assert raw.canonical_map(tokenizer).ids_V.tolist() == [0, 1, 2]
    wide = raw.bind(CanonicalMap.identity(5))
    assert wide.canonical_map(tokenizer).token_ids == 5
    narrow = raw.bind(CanonicalMap.identity(2))
    with pytest.raises(MismatchError, match="has 3 ids, the specification's vocabulary 2"):
        narrow.canonical_map(tokenizer)


def test_a_vocabulary_of_2_to_30_is_refused():
    vocabulary = Vocabulary(token_ids=2**31, canonical_ids=2**30, sha256="")
    with pytest.raises(ConfigError, match="canonical_ids=1073741824: 1 to 2"):
        replace(nano().specification, vocabulary=vocabulary)


def test_binding_to_another_vocabulary_is_refused_with_both_checksums():
    one, other = CanonicalMap(torch.tensor([0, 0, 1])), CanonicalMap(torch.tensor([0, 1, 1]))
    specification = replace(nano().specification, pad_id=1).bind(one)
    with pytest.raises(MismatchError) as refusal:
        specification.bind(other)
    assert one.sha256 in str(refusal.value) and other.sha256 in str(refusal.value)
