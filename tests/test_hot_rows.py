"""Hot rows stand first in packed files, and a cache that begins with them gives the same bits."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stores import FORMATS, content
from table_files import trainable
from test_data import TEXTS, jsonl, make
from tiny import VOCABULARY, trained_model

from engram_lm import EngramLMForCausalLM, corpus
from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.rows import RowFormat, RowStore
from engram_lm.store import packed
from engram_lm.store.cache import Cache
from engram_lm.store.pack import pack
from engram_lm.store.packed import Packed
from engram_lm.store.sets import PROBATION, WAYS
from engram_lm.store.source import open_sources
from engram_lm.train import hot_rows
from engram_lm.train.hot_rows import count_rows, hottest
from engram_lm.train.shards import Shards

HOT = torch.tensor([90, 3, 57, 0, 41, 109, 8, 77])


def table(directory: Path, dtype: str = "int8", hot_K: torch.Tensor | None = HOT) -> Path:
    trainable(directory, 50, 8)
    source = open_sources(directory)[0]
    path = directory / "table.safetensors"
    pack(source, RowFormat.named(dtype, 8), "packed", path, hot_K=hot_K)
    return path


def split_file(path: Path) -> tuple[dict, bytes]:
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def rewritten(path: Path, header: dict, rest: bytes) -> None:
    """With checksums of numbers and copies that hold, and sealed: only what is said is wrong."""
    said, end = header["__metadata__"], header["hot_rows"]["data_offsets"][1]
    cut = header["hot_numbers"]["data_offsets"][1]
    if "hot_sha256" in said:
        said["hot_sha256"] = "".join(
            hashlib.sha256(part).hexdigest() for part in (rest[:cut], rest[cut:end])
        )
    text = json.dumps(header, separators=(",", ":")).encode()
    sealed = len(text).to_bytes(8, "little") + text
    path.write_bytes(packed._sealed(sealed, packed.seal(sealed)) + rest)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_numbers_and_copies_stand_before_the_rows_as_the_page_says(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(packed, "BLOCK_BYTES", 70)
    header, rest = split_file(table(tmp_path, dtype))
    row_bytes, hot = header["rows"]["shape"][1], len(HOT)
    assert list(header) == ["__metadata__", "hot_numbers", "hot_rows", "rows"]
    assert header["hot_numbers"] == {"dtype": "I64", "shape": [hot], "data_offsets": [0, 8 * hot]}
    begin = hot * (8 + row_bytes)
    assert header["hot_rows"] == {
        "dtype": "U8",
        "shape": [hot, row_bytes],
        "data_offsets": [8 * hot, begin],
    }
    numbers, copies, rows = rest[: 8 * hot], rest[8 * hot : begin], rest[begin:]
    size = (tmp_path / "table.safetensors").stat().st_size
    assert (size - len(rows)) % 4096 == 0 and (size - len(rest)) % 8 == 0
    assert numbers == b"".join(int(row).to_bytes(8, "little") for row in HOT)
    assert copies == b"".join(rows[row * row_bytes : (row + 1) * row_bytes] for row in HOT)
    step = int(header["__metadata__"]["block_rows"]) * row_bytes
    blocks = [copies[at : at + step] for at in range(0, len(copies), step)]
    digits = [hashlib.sha256(part).hexdigest() for part in (numbers, *blocks)]
    assert header["__metadata__"]["hot_sha256"] == "".join(digits) and len(blocks) > 1
    hottest_first = list(Packed.open(tmp_path / "table.safetensors").hot.blocks(hot - 1))
    assert torch.cat([rows_M for rows_M, _ in hottest_first]).equal(HOT[:-1])
    read = load_file(tmp_path / "table.safetensors")
    assert torch.cat([bytes_MR for _, bytes_MR in hottest_first]).equal(read["hot_rows"][:-1])
    assert torch.equal(read["hot_rows"], read["rows"][read["hot_numbers"]])
    # Without hot rows it is the same but for them.
    plain, without = split_file(table(tmp_path / "plain", dtype, None))
    assert without == rows and set(plain) == {"__metadata__", "rows"}
    assert plain["__metadata__"]["block_sha256"] == header["__metadata__"]["block_sha256"]


def test_any_flipped_byte_of_numbers_and_copies_is_found(tmp_path, capsys):
    path = table(tmp_path)
    whole, hot = path.read_bytes(), Packed.open(path).hot
    assert torch.equal(hot.rows_K, HOT)
    assert main(["pack", "--verify", str(path), "--json"]) == 0
    for place in range(hot.region.offset - 8 * len(HOT), hot.region.end):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        if place < hot.region.offset:
            with pytest.raises(DataError, match="hot_numbers are not what hot_sha256 says"):
                Packed.open(path)
        else:
            assert list(Packed.open(path).damaged_copies()) == [(0, 0, len(HOT))]
            assert not list(Packed.open(path).damaged())
            with pytest.raises(DataError, match="hot rows 0 to 7 are not what hot_sha256 says"):
                next(Packed.open(path).hot.blocks(1))
    capsys.readouterr()
    assert main(["pack", "--verify", str(path)]) == 1
    shown, last = capsys.readouterr().out.splitlines()[1:]
    assert "block 0 of hot rows: among places 0 to 7" in shown
    (found,) = json.loads(last)["verify"]
    assert (found["damaged"], len(found["damaged_copies"])) == ([], 1)
    assert found["sha256"] != found["recorded_sha256"] == Packed.open(path).sha256
    path.write_bytes(whole)
    assert Packed.open(path).verify() == (found["recorded_sha256"], [], [])


def test_copies_that_are_not_the_rows_are_found_though_their_checksum_holds(tmp_path):
    path = table(tmp_path)
    header, rest = split_file(path)
    rewritten(path, header, rest)
    assert not list(Packed.open(path).damaged_copies())  # so far they are
    other = bytearray(rest)
    other[8 * len(HOT) + 5] ^= 1
    rewritten(path, header, bytes(other))
    assert [damage.block for damage in Packed.open(path).damaged_copies()] == [0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (90, "hot row 90 is there more than once"),
        (-1, "hot row -1: the table has rows 0 to 111"),
        (112, "hot row 112: the table has rows 0 to 111"),
        (-(2**63), "hot row -9223372036854775808: the table has"),
    ],
)
def test_numbers_that_are_no_rows_or_repeat_are_refused(tmp_path, row, message):
    path = table(tmp_path)
    header, rest = split_file(path)
    rewritten(path, header, rest[:8] + row.to_bytes(8, "little", signed=True) + rest[16:])
    with pytest.raises(DataError, match=f"{path}: {message}"):
        Packed.open(path)
    (tmp_path / "again").mkdir()
    with pytest.raises(DataError, match=message):
        table(tmp_path / "again", hot_K=torch.tensor([90, row, *range(10, 16)]))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hot_numbers", {"dtype": "U64"}, "hot_numbers U64"),
        ("hot_numbers", {"shape": [8, 1]}, "hot_numbers I64 (8, 1)"),
        ("hot_rows", {"dtype": "I8"}, "hot_rows I8"),
        ("hot_rows", {"shape": [10, 8]}, "hot_rows U8 (10, 8)"),
        ("hot_rows", {"shape": [80]}, "hot_rows U8 (80,)"),
        ("__metadata__", {"hot_sha256": None}, "metadata key 'hot_sha256'"),
        ("__metadata__", {"block_rows": "4", "block_sha256": "0" * 64 * 28}, "128 digits, not 192"),
    ],
    ids=str,
)
def test_hot_rows_that_do_not_fit_their_table_are_refused(tmp_path, name, changes, message):
    path = table(tmp_path)
    header, rest = split_file(path)
    header[name] |= changes
    header[name] = {key: value for key, value in header[name].items() if value is not None}
    rewritten(path, header, rest)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        Packed.open(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_tensors_in_another_order_or_alone_are_refused(tmp_path):
    path = table(tmp_path)
    header, rest = split_file(path)
    for renamed in ({"hot_rows": "more"}, {"hot_rows": "rows", "rows": "hot_rows"}):
        changed = {renamed.get(name, name): entry for name, entry in header.items()}
        text = json.dumps(changed, separators=(",", ":")).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        with pytest.raises(DataError, match="one named 'rows' is needed, and before it none or"):
            Packed.open(path)


@pytest.mark.parametrize("hot", [0, 7, 12])
def test_hot_rows_come_in_multiples_of_eight(tmp_path, hot):
    with pytest.raises(ConfigError, match=f"{hot} hot rows in a packed file: .* multiple of 8"):
        table(tmp_path, hot_K=torch.arange(hot))


class Unread(RowStore):
    """A slower store that nobody may ask."""

    def __init__(self, format: RowFormat, rows: int) -> None:
        self.format, self.rows = format, rows

    def gather(self, rows_M: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"asked for {len(rows_M)} rows")

    def prefetch(self, rows_M: torch.Tensor) -> None:
        raise AssertionError(f"asked for {len(rows_M)} rows ahead")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_seeded_rows_are_answered_without_the_slower_store(format):
    bytes_VR = content(format, 400)
    budget = 6 * WAYS * (format.row_bytes + 16)
    with Cache(Unread(format, 400), budget) as cache:
        assert cache.places == 6 * WAYS
        rows_K = torch.arange(cache.places) + 200  # as many in each set as it holds
        cache.seed(rows_K, bytes_VR[rows_K])
        cache.prefetch(rows_K)
        again_M = rows_K[torch.randperm(len(rows_K)).repeat(2)]
        assert torch.equal(cache.gather(again_M), bytes_VR[again_M])
        assert (cache.asked, cache.hits) == (len(again_M), len(again_M))


class Counted(Unread):
    """Rows whose bytes say their number."""

    def gather(self, rows_M: torch.Tensor) -> torch.Tensor:
        return rows_M.contiguous().view(torch.uint8).view(-1, 8)


LONG = RowFormat(dtype=torch.bfloat16, dim=4)
ROWS = 100_000


def held(cache: Cache, rows_K: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(cache._sets.here(rows_K.numpy()))


def test_a_set_takes_the_hottest_and_rows_asked_for_once_do_not_push_them_out():
    sets = 10
    cache = Cache(Counted(LONG, ROWS), sets * WAYS * (8 + 16))
    assert cache._sets.count == sets
    rows_K = torch.randperm(2000)[:300]
    for piece in rows_K.split(70):  # what came first keeps its place
        cache.seed(piece, cache.slower.gather(piece))
    by_set: Counter[int] = Counter()
    for row, there in zip(rows_K.tolist(), held(cache, rows_K).tolist(), strict=True):
        by_set[row % sets] += 1
        assert there == (by_set[row % sets] <= WAYS)
    assert max(by_set.values()) > WAYS
    hot_K = rows_K[held(cache, rows_K)]
    for new_M in torch.arange(2000, 20_000).split(24):
        assert torch.equal(cache.gather(new_M), cache.slower.gather(new_M))
    left = Counter((hot_K[held(cache, hot_K)] % sets).tolist())
    assert all(left[index] >= WAYS - PROBATION for index in range(sets) if by_set[index] >= WAYS)
    assert torch.equal(cache.gather(hot_K), cache.slower.gather(hot_K))


def test_a_model_served_with_hot_rows_has_equal_logits_and_hits_from_the_first_pass_on(tmp_path):
    whole = trained_model(1)
    whole.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (3, 29), generator=generator)
    (tmp_path / "tables").mkdir()
    asked = whole.model.addresses.rows(ids)
    for source, rows_BTH in zip(open_sources(tmp_path / "model"), asked, strict=True):
        rows_U = rows_BTH.unique()
        hot_K = rows_U[torch.randperm(len(rows_U), generator=generator)][: len(rows_U) // 16 * 8]
        path = tmp_path / "tables" / f"{source.layer}.safetensors"
        pack(source, source.format, "packed", path, hot_K=hot_K)
    for budget in ("1MB", 2 * 24 * 48 * 4):
        served = EngramLMForCausalLM.from_pretrained(
            tmp_path / "model", memory="disk", memory_budget=budget, tables=tmp_path / "tables"
        )
        with torch.no_grad():
            found, wanted = (model(ids, use_cache=False).logits for model in (served, whole))
        assert torch.equal(found, wanted)
        for layer, rows_BTH in zip(served.model.addresses.layers, asked, strict=True):
            cache, disk = served.model.served.metrics()[layer].tiers
            unique = len(rows_BTH.unique())
            assert cache.hits > 0 and disk.asked == unique - cache.hits
            if budget == "1MB":
                assert cache.hits == unique // 16 * 8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Path, Addresses]:
    """Token shards of a few documents, and a checkpoint whose tokenizer is theirs."""
    directory = tmp_path_factory.mktemp("prepared")
    make(directory / "shards", jsonl(directory / "text.jsonl", TEXTS))
    canonical = CanonicalMap.from_tokenizer(corpus.tokenizer())
    trainable(directory / "model", 100, 8, canonical=canonical)
    specification = open_sources(directory / "model")[0].specification
    return directory / "shards", directory / "model", Addresses(specification, canonical)


def requests(shards: Path, addresses: Addresses) -> dict[int, Counter[int]]:
    """How often each row is asked for, documents apart where n-grams do not run across them."""
    split, found = Shards(shards).split("train"), {layer: Counter() for layer in addresses.layers}
    ids_T = torch.from_numpy(split.read(0, len(split)).astype(np.int64))
    cross = addresses.specification.boundary_rule == "cross"
    starts_D = [] if cross else np.flatnonzero(split.starts(0, len(split)))[1:].tolist()
    for document in ids_T.tensor_split(starts_D):
        for layer, rows_BTH in zip(addresses.layers, addresses.rows(document[None]), strict=True):
            found[layer].update(rows_BTH.flatten().tolist())
    return found


@pytest.mark.parametrize("tokens", [7, 2**16])
@pytest.mark.parametrize("rule", ["cross", "document"])
def test_rows_are_counted_as_documents_ask_for_them(prepared, tokens, rule, monkeypatch):
    shards, _, bound = prepared
    addresses = Addresses(replace(bound.specification, boundary_rule=rule), bound.canonical)
    monkeypatch.setattr(hot_rows, "TOKENS", tokens)
    counts = count_rows(Shards(shards).split("train"), addresses, [2])
    wanted = requests(shards, addresses)[2]
    assert set(counts) == {2}
    assert {int(row): int(counts[2][row]) for row in np.flatnonzero(counts[2])} == wanted


def test_the_hottest_come_first_and_ties_by_number():
    draw = np.random.default_rng(0)
    counts_V = draw.integers(0, 5, 500).astype(np.uint32)
    ranked = sorted(range(500), key=lambda row: (-int(counts_V[row]), row))
    asked = int(np.count_nonzero(counts_V))
    for most, length in ((8, 8), (100, 96), (401, asked // 8 * 8), (500, asked // 8 * 8), (7, 0)):
        assert hottest(counts_V, most).tolist() == ranked[: min(length, most // 8 * 8)]


@pytest.mark.parametrize(("hot", "rows"), [("0.1", 16), ("24", 24)])
def test_the_command_packs_the_rows_that_shards_ask_for_most(prepared, capsys, tmp_path, hot, rows):
    shards, model, addresses = prepared
    command = ["pack", str(model), "--out", str(tmp_path), "--hot", hot, "--data", str(shards)]
    assert main(command) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [table["hot_rows"] for table in json.loads(shown[-1])["tables"]] == [rows, rows]
    assert re.search(rf"layer 0: {rows} hot rows .*% of what [\d,]+ tokens ask for", shown[0])
    for layer, counts in requests(shards, addresses).items():
        ranked = sorted(counts, key=lambda row: (-counts[row], row))
        path = tmp_path / f"table-{layer:05}.safetensors"
        assert Packed.open(path).hot.rows_K.tolist() == ranked[:rows]
        assert main(["pack", "--verify", str(path), "--json"]) == 0


def test_shards_of_another_tokenizer_are_refused(prepared, capsys, tmp_path):
    trainable(tmp_path / "model", 100, 8)
    command = ["pack", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--hot", "0.1"]
    assert main([*command, "--data", str(prepared[0])]) == 2
    error = capsys.readouterr().err
    assert "the tokenizer's canonical map is not the specification's" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
