"""Your own text: read, encoded once, cut into batches and judged, with every document apart."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import DEEPSEEK_TOKENIZER
from rich.console import Console
from test_train import final, states_equal
from tiny import tiny_model
from tokenizers import Tokenizer

from engram_lm import corpus
from engram_lm.cli import main
from engram_lm.errors import DataError, MismatchError
from engram_lm.evaluate.token_losses import token_losses
from engram_lm.model.positions import packed_positions
from engram_lm.train import shards
from engram_lm.train.batches import Batches
from engram_lm.train.digests import Digests
from engram_lm.train.documents import parts
from engram_lm.train.encoder import Encoder
from engram_lm.train.prepare import Request, prepare
from engram_lm.train.shards import Shards, Split

SEPARATOR = corpus.SEPARATOR
TEXTS = [f"Document {n}: {'the Nile, ' * n}Zürich\n\nand a second paragraph." for n in range(9)]


def jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def encoder() -> Encoder:
    return Encoder.open(corpus.tokenizer_file(), SEPARATOR)


def make(out: Path, *sources: Path, **options) -> dict:
    request = Request(sources=tuple(map(str, sources)), **options)
    return prepare(request, encoder(), out, Console(quiet=True))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def texts_of(split: Split) -> list[str]:
    ids = split.read(0, len(split))
    starts = np.flatnonzero(split.starts(0, len(split)))
    backend = Tokenizer.from_file(str(corpus.tokenizer_file()))
    assert (ids[starts] == 0).all() and (ids == 0).sum() == len(starts)
    return [backend.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "engram_lm", *map(str, arguments), "--json"]


def kill_when(path: Path, arguments: list[str]) -> None:
    """Runs a command and ends it with SIGKILL as soon as `path` exists."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300  # never reached: a guard against waiting for ever
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def refused(capsys, *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if not line.startswith("preparing"))
    return line


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "data set"])
@pytest.mark.parametrize("first", [0, 1, 5, 9])
def test_every_format_gives_the_same_documents_from_any_number_on(tmp_path, kind, first):
    if kind == "text":
        for number, text in enumerate(TEXTS):
            (tmp_path / f"{number}.{'txt' if number % 2 else 'md'}").write_text(text)
        found = [d.text for part in parts(str(tmp_path))[first:] for d in part.documents(0)]
        assert found == TEXTS[first:]
        return
    if kind == "parquet":
        table = pyarrow.table({"text": TEXTS, "other": range(9)})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    else:
        jsonl(tmp_path / "a.jsonl", TEXTS)
    (part,) = parts(f"hf:{tmp_path}" if kind == "data set" else str(tmp_path))
    assert [document.text for document in part.documents(first)] == TEXTS[first:]


def test_documents_come_back_whole_with_their_boundaries_and_bytes(tmp_path):
    quoting = [f"{SEPARATOR} is no end here, {SEPARATOR}", " ", "x", "<|pad|>"]
    index = make(tmp_path / "out", jsonl(tmp_path / "a.jsonl", [*TEXTS, *quoting]), validation=0)
    kept = [text for text in [*TEXTS, *quoting] if text.strip()]
    split = Shards(tmp_path / "out").split("train")
    assert texts_of(split) == kept
    assert np.concatenate([p.bytes_D for p in split.shards]).tolist() == [
        len(text.encode()) for text in kept
    ]
    assert index["sources"][0]["empty"] == 1


def test_a_document_is_kept_once_whatever_file_it_stands_in(tmp_path):
    one = jsonl(tmp_path / "a.jsonl", ["same", "first", "same"])
    other = jsonl(tmp_path / "b.jsonl", ["second", "first", "same ", "Same"])
    (tmp_path / "c.txt").write_text("second")
    sources = (one, other, tmp_path / "c.txt")
    index = make(tmp_path / "out", *sources, validation=0, shard_tokens=1)
    found = texts_of(Shards(tmp_path / "out").split("train"))
    assert found == ["same", "first", "second", "same ", "Same"]
    assert [source["duplicates"] for source in index["sources"]] == [1, 1, 1]
    assert len(index["shards"]) == 5


def test_a_documents_split_is_a_function_of_its_text_alone(tmp_path):
    texts = corpus.documents("validation")[:600]
    make(tmp_path / "all", jsonl(tmp_path / "a.jsonl", texts), validation=0.25)
    make(tmp_path / "some", jsonl(tmp_path / "b.jsonl", texts[::-2]), validation=0.25)
    held_out, again = (
        set(texts_of(Shards(tmp_path / name).split("validation"))) for name in ("all", "some")
    )
    assert again == held_out & set(texts[::-2])
    assert 0.18 < len(held_out) / len(set(texts)) < 0.32  # four standard deviations


def test_ids_are_as_narrow_as_the_vocabulary_allows(tmp_path):
    assert shards.dtype(2**16) is np.uint16 and shards.dtype(2**16 + 1) is np.uint32
    wide = Encoder.open(DEEPSEEK_TOKENIZER, "<|end▁of▁sentence|>".replace("|", "｜"))
    source = jsonl(tmp_path / "a.jsonl", ["北京 is far", "ok"])
    request = Request(sources=(str(source),), validation=0)
    prepare(request, wide, tmp_path / "out", Console(quiet=True))
    split = Shards(tmp_path / "out").split("train")
    ids = split.read(0, len(split))
    assert ids.dtype == np.uint32 and ids[0] == wide.separator_id
    assert wide.backend.decode(ids[1 : int(split.shards[0].starts_D[1])].tolist()) == "北京 is far"


def test_a_directory_of_a_tokenizer_says_what_separates(tmp_path):
    corpus.tokenizer().save_pretrained(tmp_path)
    found = Encoder.open(tmp_path)
    assert (found.separator, found.padding) == (SEPARATOR, "<|pad|>")
    assert Encoder.open(tmp_path, "the").separator == "the"


def test_a_tokenizer_that_cuts_or_pads_is_kept_from_it(tmp_path):
    backend = Tokenizer.from_file(str(corpus.tokenizer_file()))
    backend.enable_truncation(4)
    backend.enable_padding(length=300)
    backend.save(str(tmp_path / "tokenizer.json"))
    found = Encoder.open(tmp_path / "tokenizer.json", SEPARATOR).encode(TEXTS)
    assert found == encoder().encode(TEXTS) and len(found[8]) > 4


def test_a_command_killed_with_sigkill_writes_the_bytes_of_one_that_was_not(tmp_path):
    texts = corpus.documents("validation")
    first = jsonl(tmp_path / "a.jsonl", texts[:1500] + texts[:20])
    second = jsonl(tmp_path / "b.jsonl", texts[1000:])

    def prepared(out: str) -> list[str]:
        tokenizer = f"--tokenizer={corpus.tokenizer_file()}"
        sizes = ("--validation=0.1", "--shard-tokens=1500", f"--separator={SEPARATOR}")
        return command("data", first, second, tokenizer, *sizes, f"--out={tmp_path / out}")

    subprocess.run(prepared("whole"), check=True, capture_output=True)
    # In the first file, and in the second; the second time it goes on from the first.
    kill_when(tmp_path / "killed" / "shard-00003.safetensors", prepared("killed"))
    kill_when(tmp_path / "killed" / "shard-00040.safetensors", prepared("killed"))
    assert (tmp_path / "killed" / "unfinished.sqlite").exists()
    assert not (tmp_path / "killed" / "index.json").exists()
    done = subprocess.run(prepared("killed"), check=True, capture_output=True, text=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert json.loads(done.stdout)["duplicates"] == 20 + 500 + len(texts) - len(set(texts))


@pytest.mark.parametrize("killed_at", ["before the commit", "after the commit"])
def test_no_moment_between_shard_and_record_loses_a_document(tmp_path, monkeypatch, killed_at):
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    make(tmp_path / "whole", source, shard_tokens=30)
    commit, calls = Digests.commit, []

    def killed(self, record):
        calls.append(record)
        if len(calls) != 3 or killed_at == "after the commit":
            commit(self, record)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Digests, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed", source, shard_tokens=30)
    make(tmp_path / "killed", source, shard_tokens=30)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_what_is_finished_is_not_done_again_and_other_requests_are_refused(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    index, before = make(tmp_path / "out", source), contents(tmp_path / "out")
    assert make(tmp_path / "out", source) == index and contents(tmp_path / "out") == before
    with pytest.raises(MismatchError, match=r"request.validation is 0.01, this run has 0.5"):
        make(tmp_path / "out", source, validation=0.5)
    jsonl(source, TEXTS[:-1])
    with pytest.raises(MismatchError, match="other names, sizes or dates"):
        make(tmp_path / "out", source)


def test_two_at_once_in_one_directory_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    other = Digests(tmp_path / "out" / "unfinished.sqlite")
    with pytest.raises(DataError, match="does another `engram data` use it"):
        make(tmp_path / "out", jsonl(tmp_path / "a.jsonl", TEXTS))
    other.close()


def changed(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_damaged_mixed_and_missing_files_are_refused_by_name(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    make(out, source, shard_tokens=60)
    one, other = out / "shard-00000.safetensors", out / "shard-00001.safetensors"
    whole = contents(out)
    changed(one, -1)
    with pytest.raises(DataError, match="shard-00000.safetensors: damaged"):
        Shards(out)
    one.write_bytes(whole[one.name][:100])
    with pytest.raises(DataError, match="shard-00000.safetensors: no token shard can be read"):
        Shards(out)
    one.write_bytes(whole[other.name])
    with pytest.raises(MismatchError, match="belongs elsewhere: number is 1, this run has 0"):
        Shards(out)
    one.unlink()
    with pytest.raises(DataError, match="shard-00000.safetensors"):
        Shards(out)
    one.write_bytes(whole[one.name])
    changed(out / "tokenizer.json", 200)
    with pytest.raises(MismatchError, match=r"tokenizer.json: sha256"):
        Shards(out)
    (out / "index.json").write_text("{}")
    with pytest.raises(DataError, match="not an index"):
        Shards(out)


def test_a_shard_of_another_tokenizer_is_refused(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    make(tmp_path / "one", source)
    request = Request(sources=(str(source),))
    prepare(request, Encoder.open(corpus.tokenizer_file(), "the"), tmp_path / "two", Console())
    name = "shard-00000.safetensors"
    (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(MismatchError, match="separator_id"):
        Shards(tmp_path / "one")


def test_any_stretch_of_the_shards_is_that_of_the_whole(prepared):
    split = Shards(prepared).split("train")
    assert len(split.shards) > 3
    ids = np.concatenate([packed.ids_T for packed in split.shards])
    starts = ids == 0  # nothing but separators is 0, so they tell where documents start
    generator = np.random.default_rng(0)
    for first in [0, *generator.integers(0, len(ids) - 1, 200)]:
        last = min(len(ids), first + int(generator.integers(1, 9000)))
        assert np.array_equal(split.read(first, last), ids[first:last])
        assert np.array_equal(split.starts(first, last), starts[first:last])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells what is mapped")
def test_shards_are_mapped_into_memory_and_not_loaded(prepared):
    split = Shards(prepared).split("train")
    assert str(prepared / "shard-00000.safetensors") in Path("/proc/self/maps").read_text()
    assert not any(packed.ids_T.flags.owndata for packed in split.shards)


def test_positions_of_a_batch_begin_again_at_every_document(prepared):
    split = Shards(prepared).split("train")
    batches = Batches(split, batch=8, context=64, seed=3)
    seen = 0
    for step in range(5):
        inputs, targets, positions = batches[step]
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        for row, found in zip(inputs.tolist(), positions.tolist(), strict=True):
            position, wanted = -1, []
            for token in row:
                position = 0 if token == 0 else position + 1
                wanted.append(position)
            assert found == wanted
            seen += row.count(0)
    assert seen > 40


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [(1, True), (4, True)], ids=["one stream", "four streams"])
def test_packed_rows_of_a_batch_equal_the_documents_alone(attention, shape):
    model = tiny_model(*shape)
    model.set_attn_implementation(attention)
    lengths = ([5, 1, 9, 8], [23], [1, 1, 20, 1])
    ids = torch.randint(2, 97, (3, 23))
    starts = np.zeros((3, 23), dtype=np.bool_)
    for row, sizes in enumerate(lengths):
        starts[row, np.cumsum([0, *sizes[:-1]])] = True
    positions = torch.from_numpy(packed_positions(starts))
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        for row, sizes in enumerate(lengths):
            parts = [model(part[None]).logits[0] for part in ids[row].split(sizes)]
            # float32 through three layers, with other zeros in its sums
            assert (packed[row] - torch.cat(parts)).abs().max() < 1e-4


def test_bits_per_byte_of_packed_documents_are_those_of_the_documents_alone():
    model = tiny_model(1, True)
    generator = np.random.default_rng(1)
    sizes, bytes_of_text = [7, 1, 13, 4, 9], np.array([30, 1, 50, 12, 41])
    ids = generator.integers(2, 97, sum(sizes)).astype(np.uint16)
    starts = np.cumsum([0, *sizes[:-1]])
    ids[starts] = 0
    cut = 3  # two shards, the second from document 3 on
    packed = [
        shards.Packed(ids[: starts[cut]], starts[:cut], bytes_of_text[:cut]),
        shards.Packed(ids[starts[cut] :], starts[cut:] - starts[cut], bytes_of_text[cut:]),
    ]
    split = Split(packed, "")
    for wanted, documents in ((1, 1), (7, 1), (8, 2), (9, 3), (21, 3), (22, 4), (99, 5)):
        tokens, size = split.judged(wanted)
        assert tokens == sum(sizes[:documents])
        assert size == bytes_of_text[:documents].sum()
        found = (
            token_losses(
                model, split.read(0, tokens), context=64, batch=2, starts_T=split.starts(0, tokens)
            )
            if tokens > 1
            else np.zeros(0)
        )
        alone = []
        for document in np.split(ids[:tokens], starts[1:documents]):
            follows = [] if len(alone) + len(document) == tokens else [0]
            with torch.no_grad():
                logits = model(torch.from_numpy(document.astype(np.int64))[None]).logits[0]
            targets = torch.tensor([*document[1:].tolist(), *follows], dtype=torch.int64)
            losses = -logits.double().log_softmax(-1)[torch.arange(len(targets)), targets]
            alone += losses.tolist()
        assert np.abs(found - alone).max(initial=0) < 1e-4  # float32 logits against themselves


SMALL = ["--set=train.batch=4", "--set=train.context=32", "--set=train.evaluate_every=8"]
SMALL += ["--set=train.validation_tokens=300", "--set=train.checkpoint_every=4", "--threads=1"]
SMALL += ["--set=model.hidden_size=32", "--set=model.num_hidden_layers=4"]
SMALL += ['--set=model.mlp_layer_types=["sparse","sparse","sparse","sparse"]']
ROWS = '--set=model.memory.specification.rows_per_head=["97","97"]'


def test_training_on_your_own_data_killed_with_sigkill_ends_as_if_it_had_not_been(
    prepared, tmp_path
):
    def trained(out: str) -> list[str]:
        options = ("--set=train.tokens=2560", ROWS, f"--data={prepared}", f"--out={tmp_path / out}")
        return command("train", *options, *SMALL)  # 20 steps

    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    subprocess.run(trained("whole"), check=True, capture_output=True, env=environment)
    kill_when(tmp_path / "killed/checkpoints/step-00000004", trained("killed"))
    assert not (tmp_path / "killed" / "model").exists()
    ran = subprocess.run(
        trained("killed"), check=True, capture_output=True, env=environment, text=True
    )
    assert re.search(r"^going on from step \d+ \(.*/checkpoints/step-\d{8}\)$", ran.stderr, re.M)
    assert states_equal(final(tmp_path / "whole"), final(tmp_path / "killed"))
    for name in ("whole", "killed"):
        (tmp_path / name / "config.json").unlink()  # holds the machine, not the result
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    found = [[json.loads(line) for line in text.splitlines()] for text in lines]
    for records in found:
        for record in records:
            for name in ("seconds", "tokens_per_second", "memory/resident", "memory/resident_peak"):
                del record[name]
            for name in ("checkpoint_seconds", "checkpoint_bytes"):  # of the process that saved
                record.pop(name, None)
    assert found[0] == found[1] and len(found[0]) == 20


def trained_model(out: Path) -> dict:
    return json.loads((out / "model" / "config.json").read_text())


def test_a_model_takes_the_vocabulary_of_its_data(capsys, tmp_path):
    documents = corpus.documents("validation")[:200]
    source = jsonl(tmp_path / "a.jsonl", documents)
    backend = Tokenizer.from_file(str(corpus.tokenizer_file()))
    backend.add_tokens(["Macedon!", "Bucephalus!"])
    backend.save(str(tmp_path / "tokenizer.json"))
    data = ["data", str(source), f"--out={tmp_path}/d", "--json", "--validation=0.2"]
    data += [f"--tokenizer={tmp_path}/tokenizer.json", "--separator=Macedon!"]
    assert main(data) == 0
    base = ["train", f"--data={tmp_path}/d", "--set=train.tokens=128", *SMALL]
    assert main([*base, ROWS, f"--out={tmp_path}/one"]) == 0
    config = trained_model(tmp_path / "one")
    separator = 8192
    assert config["vocab_size"] == 8194 and config["pad_token_id"] is None
    assert config["bos_token_id"] == config["eos_token_id"] == separator
    specification = config["memory"]["specification"]
    assert specification["pad_id"] == separator
    assert specification["boundary_rule"] == "document"
    cross = "--set=model.memory.specification.boundary_rule=cross"
    assert main([*base, ROWS, cross, f"--out={tmp_path}/two"]) == 0
    config = trained_model(tmp_path / "two")
    assert config["memory"]["specification"]["boundary_rule"] == "cross"
    generate = ["generate", f"--model={tmp_path}/one/model", "--prompt=The Nile", "--tokens=3"]
    assert main(generate) == 0
    capsys.readouterr()
    for preset in ("nano-moe", "nano-engram"):
        small = [*base, f"--preset={preset}", "--set=model.vocab_size=8192"]
        assert "the tokenizer has 8194" in refused(capsys, *small, f"--out={tmp_path}/x")
    other = [*base, ROWS, f"--data={tmp_path}/e", f"--out={tmp_path}/one"]
    assert main([*data[:2], f"--out={tmp_path}/e", "--validation=0.3", *data[5:]]) == 0
    assert "data_sha256" in refused(capsys, *other)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b", "its ending is none of .txt, .md, .jsonl, .parquet"),
        ("a.txt", b"\xff\xfe", "a.txt: not UTF-8"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"txt": "b"}\n',
            "a.jsonl:2: no field 'text'; there",
        ),
        ("a.jsonl", b'{"text": 1}\n', "a.jsonl:1: field 'text' holds int"),
        ("a.jsonl", b'{"text": "a"}\n\n', "a.jsonl:2: not a JSON object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: field 'text' is not Unicode text"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1: not a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: not UTF-8"),
        ("a.jsonl", b'{"text": " "}\n', "no document with any text"),
        ("a.jsonl", b"", "no document with any text"),
        ("a.parquet", b"PAR1", "no Parquet table can be read"),
    ],
)
def test_files_that_hold_no_documents_are_one_line(capsys, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    tokenizer = f"--tokenizer={corpus.tokenizer_file()}"
    arguments = ("data", tmp_path / name, tokenizer, f"--separator={SEPARATOR}", "--json")
    assert message in refused(capsys, *arguments, f"--out={tmp_path}/out")


def test_columns_without_documents_are_one_line(capsys, tmp_path):
    table = pyarrow.table({"body": ["a", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    tokenizer = f"--tokenizer={corpus.tokenizer_file()}"
    base = ("data", "--json", tokenizer, f"--separator={SEPARATOR}", f"--out={tmp_path}/out")
    parquet, hub = tmp_path / "a.parquet", f"hf:{tmp_path}"
    assert "no field 'text'; there are 'body'" in refused(capsys, *base, parquet)
    assert "row 2: field 'body' holds NoneType" in refused(capsys, *base, parquet, "--field=body")
    base = (*base[:-1], f"--out={tmp_path}/hub")
    assert "row 1: no field 'text'" in refused(capsys, *base, hub)
    assert "cannot be streamed" in refused(capsys, *base, hub, "--split=tset")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--validation=1"], "validation=1.0"),
        (["--shard-tokens=0"], "shard_tokens=0"),
        (["--separator=<none>"], "separator='<none>': the tokenizer has no such token"),
        (["--tokenizer=/nowhere"], "No such file"),
        (["/nowhere.txt"], "/nowhere.txt: no such file"),
        (["--out=/dev/null"], "/dev/null: File exists"),
        (["/nowhere"], "/nowhere: its ending is none of"),
    ],
    ids=str,
)
def test_wrong_requests_are_one_line(capsys, tmp_path, arguments, message):
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    base = ["data", f"--tokenizer={corpus.tokenizer_file()}", f"--out={tmp_path}/out", "--json"]
    assert message in refused(capsys, *base, f"--separator={SEPARATOR}", source, *arguments)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_known_or_read_is_one_line(capsys, tmp_path, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "empty").mkdir()
    base = ["data", f"--tokenizer={corpus.tokenizer_file()}", f"--out={tmp_path}/out", "--json"]
    assert "give --separator TOKEN" in refused(capsys, *base, source)
    base += [f"--separator={SEPARATOR}"]
    assert "no file in it ends with" in refused(capsys, *base, tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'engram-lm[data]'" in refused(capsys, *base, f"hf:{tmp_path}")
    train = ["train", f"--out={tmp_path}/run"]
    assert "no index.json" in refused(capsys, *train, f"--data={tmp_path}/empty")
    make(tmp_path / "d", source, validation=0)
    assert "no document is in its validation split" in refused(
        capsys, *train, f"--data={tmp_path}/d"
    )
