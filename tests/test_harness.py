"""lm-evaluation-harness on small models, each way that leads there, against their own logits."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from families import bare, memory, speak
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import _factory

import engram_lm
from engram_lm import corpus
from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate import harness as harnesses
from engram_lm.evaluate.harness import Harness
from engram_lm.evaluate.harness_reader import HarnessReader
from engram_lm.evaluate.suites import wordnet_facts
from engram_lm.evaluate.tasks import wordnet
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.model import EngramLMForCausalLM
from engram_lm.model.presets import configure, nano_engram

KINDS = ("ours", "attached")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
OFF = {"on": True, "off": False}


def ours() -> EngramLMForCausalLM:
    torch.manual_seed(0)
    changes = {"hidden_size": 32, "memory.specification.rows_per_head": [97, 97]}
    model = EngramLMForCausalLM(configure(nano_engram(), changes))
    model.set_canonical_map(CanonicalMap.from_tokenizer(corpus.tokenizer_file()))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def attached():
    model = bare("llama", vocab_size=8192, max_position_embeddings=256)
    engram_lm.attach(model, corpus.tokenizer(), memory())
    speak(model)
    return model


@pytest.fixture(scope="module")
def models() -> dict:
    return {"ours": ours(), "attached": attached()}


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> dict[str, Path]:
    """Directories, each with its tokenizer."""
    directories = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, directory in directories.items():
        models[kind].save_pretrained(directory)
        corpus.tokenizer().save_pretrained(directory)
    return directories


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    """Openings of documents with three ends of unequal length."""
    texts = [text for text in corpus.documents("validation") if 60 < len(text) < 200][:36]
    rows = []
    trios = zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    for index, (first, second, third) in enumerate(trios):
        prompt, end = first[:30].rsplit(" ", 1)[0], first[30:].split(" ", 1)[1]
        rows.append({"prompt": prompt, "choices": [second[:40], end, third], "gold": index % 3})
    return rows


@pytest.fixture(scope="module")
def include(questions, tmp_path_factory) -> Path:
    """A user's own task files, on local data."""
    directory = tmp_path_factory.mktemp("include")
    facts = directory / "facts.jsonl"
    facts.write_text("".join(json.dumps(row) + "\n" for row in questions))
    local = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(facts)},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "prompt",
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    writing = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    short, long = ({"until": ["\n"], "max_gen_toks": tokens} for tokens in (6, 5_000))
    files = {
        "facts": {"task": "facts", **local, **choice},
        # By the name of one of lm_eval's own: the user's comes first.
        "hellaswag": {"task": "hellaswag", **local, **choice},
        "writes": {"task": "writes", **local, **writing, "generation_kwargs": short},
        "writes_much": {"task": "writes_much", **local, **writing, "generation_kwargs": long},
        "runs_code": {
            "task": "runs_code",
            "unsafe_code": True,
            **local,
            **writing,
            "generation_kwargs": short,
        },
        "both": {
            "group": "both",
            "task": ["facts", "hellaswag"],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        },
    }
    for name, content in files.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return directory


@torch.no_grad()
def log_likelihood(model, tokenizer, before: str, after: str) -> tuple[float, bool]:
    """Of `after` where it follows `before`, from the model's logits, one text at a time."""
    given = tokenizer(before)["input_ids"] or [tokenizer.bos_token_id]
    ids = torch.tensor(
        [given + tokenizer(before + after)["input_ids"][len(given) * bool(before) :]]
    )
    logits = model(ids).logits[0, len(given) - 1 : -1].log_softmax(-1)
    target = ids[0, len(given) :]
    found = logits.gather(1, target[:, None]).sum().item()
    return found, bool((logits.argmax(-1) == target).all())


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=index)
        for index, each in enumerate(arguments)
    ]


def reader(name: str, model, tokenizer, batch: int):
    if name == "HFLM":
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    return HarnessReader(model, tokenizer, batch)


@pytest.mark.parametrize("name", ["HFLM", "HarnessReader"])
@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihoods_are_those_of_the_models_logits_in_batches_of_any_size(
    models, tokenizer, questions, kind, name
):
    model = models[kind]
    pairs = [(row["prompt"], f" {choice}") for row in questions[:4] for choice in row["choices"]]
    wanted = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
    lengths = {len(tokenizer("".join(pair))["input_ids"]) for pair in pairs}
    assert len(lengths) > 6  # so that batches of 4 are padded, which lm_eval tells no model
    for batch in (1, 4):
        found = reader(name, model, tokenizer, batch).loglikelihood(
            requests("loglikelihood", pairs), disable_tqdm=True
        )
        for (value, greedy), (direct, best) in zip(found, wanted, strict=True):
            assert value == pytest.approx(direct, abs=1e-4) and greedy == best


@pytest.mark.parametrize("name", ["HFLM", "HarnessReader"])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_texts_are_read_after_the_tokenizers_first_token(models, tokenizer, kind, name):
    texts = corpus.documents("validation")[:7]
    wanted = [log_likelihood(models[kind], tokenizer, "", text)[0] for text in texts]
    for batch in (1, 4):
        found = reader(name, models[kind], tokenizer, batch).loglikelihood_rolling(
            requests("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True
        )
        assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_task_has_written_is_what_generate_writes_alone(models, tokenizer, questions, kind):
    model = models[kind]
    texts = [row["prompt"] for row in questions[:5]]
    wanted = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
        wanted.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :]))
    assert len(set(wanted)) > 1
    for batch in (1, 5):
        options = {"until": ["no such words"], "max_gen_toks": 8}
        found = HarnessReader(model, tokenizer, batch).generate_until(
            requests("generate_until", [(text, options) for text in texts]), disable_tqdm=True
        )
        assert found == wanted
    until = wanted[0][3:6]
    (cut,) = HarnessReader(model, tokenizer).generate_until(
        requests("generate_until", [(texts[0], {"until": [until], "max_gen_toks": 8})]),
        disable_tqdm=True,
    )
    assert cut == wanted[0].split(until)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_computed_by_hand_with_memory_and_without(
    models, tokenizer, include, questions, kind
):
    model = models[kind].train()
    harness = Harness(["facts", "engram_wordnet_bpb"], include=include)
    texts = corpus.documents("validation")[:6]
    seen = {}
    for column, on in OFF.items():
        found = harness.scores(model, tokenizer, memory=on, limit=6, batch=4)
        assert model.training and model.base_model.reads_memory
        model.eval()
        right, total = 0, 0.0
        model.base_model._without_memory = not on
        for row in questions[:6]:
            sums = [
                log_likelihood(model, tokenizer, row["prompt"], f" {choice}")[0]
                for choice in row["choices"]
            ]
            right += sums.index(max(sums)) == row["gold"]
        for text in texts:
            total += log_likelihood(model, tokenizer, "", text)[0]
        model.base_model._without_memory = False
        model.train()
        accuracy, bits = found
        assert (accuracy.task, accuracy.metric, accuracy.documents) == ("facts", "acc", 6)
        assert accuracy.value == pytest.approx(right / 6) and accuracy.higher_is_better
        assert 0 < right < 6
        size = sum(len(text.encode()) for text in texts)
        assert bits.value == pytest.approx(-total / size / math.log(2), abs=1e-5)
        assert bits.metric == "bits_per_byte" and bits.higher_is_better is False
        seen[column] = bits.value
    assert abs(seen["on"] - seen["off"]) > 0.001
    model.eval()


def test_a_group_is_the_mean_of_its_tasks_and_shots_are_counted(models, tokenizer, include):
    harness = Harness(["writes", "both"], include=include, shots=2)
    scores = harness.scores(models["ours"], tokenizer, limit=4, batch=4)
    found = {score.task: score for score in scores}
    assert list(found) == ["writes", "facts", "hellaswag", "both"]
    assert found["writes"].metric == "exact_match" and found["writes"].value == 0
    assert found["both"].value == pytest.approx(found["facts"].value)
    assert found["both"].documents == 8 and {score.shots for score in scores} == {2}


def test_the_same_text_is_read_by_our_tasks_as_by_our_corpus():
    rows = wordnet.prose()["test"]
    assert rows["text"] == corpus.documents("validation")


def test_definitions_are_held_out_and_the_same_on_every_machine():
    splits = wordnet.definitions()
    rows = list(splits["test"])
    text = "\n".join(corpus.documents("validation"))
    known = "\n".join(corpus.documents("train")[: wordnet.EXAMPLES])
    assert len(rows) == 724 and len(splits["train"]) > 500
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert f"{row['opening']} {row['choices'][row['gold']]}" in text
        assert len({wordnet_facts.kind(choice) for choice in row["choices"]}) == 1
    for place in range(4):
        assert 150 < sum(row["gold"] == place for row in rows) < 212
    for row in splits["train"]:
        assert f"{row['opening']} {row['choices'][row['gold']]}" in known
    # Models are compared by these questions: who changes them raises the task's version.
    digest = hashlib.sha256(json.dumps([rows, list(splits["train"])]).encode()).hexdigest()
    assert digest.startswith("23cb93882fe11ecb")


PAPER = {
    "mmlu": (5, "acc"),
    "mmlu_redux_generative": (5, "exact_match"),
    "mmlu_pro": (5, "exact_match"),
    "cmmlu": (5, "acc"),
    "ceval-valid": (5, "acc"),
    "agieval": (0, "acc"),
    "arc_easy": (25, "acc"),
    "arc_challenge": (25, "acc"),
    "triviaqa": (5, "exact_match"),
    "bbh": (3, "exact_match"),
    "hellaswag": (0, "acc"),
    "piqa": (0, "acc"),
    "winogrande": (5, "acc"),
    "drop": (1, "f1"),
    "race": (5, "acc"),
    "humaneval": (0, "pass_at_k"),
    "mbpp": (3, "pass_at_1"),
    "cruxeval_input": (0, "pass_at_k"),
    "cruxeval_output": (0, "pass_at_k"),
    "gsm8k_cot": (8, "exact_match"),
    "mgsm": (8, "exact_match"),
    "minerva_math": (4, "exact_match"),
}
"""Shots and metric of each benchmark in the paper's Table 1, by lm_eval's name."""


class Undownloaded(ConfigurableTask):
    """A task as lm_eval's factory has it before it fetches the data."""

    def __init__(self, config: dict) -> None:
        self._config = SimpleNamespace(**config)


@pytest.fixture(scope="module")
def every_task():
    """lm_eval's whole list and ours, read once."""
    return harnesses._manager(None, True)


def test_the_papers_group_is_made_of_lm_evals_tasks_with_the_papers_shots(every_task, monkeypatch):
    load = _factory.load_yaml
    monkeypatch.setattr(_factory, "load_yaml", lambda path, **_: load(path, resolve_func=False))
    monkeypatch.setattr(_factory, "ConfigurableTask", Undownloaded)
    loaded = every_task.load(["engram_paper_table1"])
    members = loaded["groups"]["engram_paper_table1"].child_names
    assert [name.split("::")[-1] for name in members] == list(PAPER)
    checked = set()
    for member, (shots, metric) in zip(members, PAPER.values(), strict=True):
        group = loaded["groups"].get(member)
        leaves = [loaded["tasks"][member]] if group is None else group.get_all_tasks()
        for leaf in leaves:
            config = leaf.config
            assert every_task.task_index[config.task].cfg["dataset_path"] == config.dataset_path
            assert config.num_fewshot == shots, config.task
            metrics = {str(each["metric"]).split(".")[-1] for each in config.metric_list}
            assert metric in metrics, config.task
            checked.add(config.task)
    assert checked == set(loaded["tasks"]) and len(checked) > 250


def test_what_the_papers_group_leaves_out_is_not_in_lm_eval(every_task):
    for name in ("popqa", "ccpm", "c3", "triviaqa_zh", "race_middle"):
        assert name not in every_task.all_tasks
    assert every_task.task_index["race"].cfg["dataset_name"] == "high"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"tasks": ["hellaswaag"]}, ConfigError, "'hellaswaag': unknown; the closest is 'hellasw"),
        ({"tasks": []}, ConfigError, "none are named"),
        ({"tasks": ["mine"], "include": Path("nowhere")}, ConfigError, "no such directory"),
        ({"tasks": ["engram_wordnet_bpb"], "shots": -1}, ConfigError, "shots=-1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_tasks_are_refused_in_one_line(every_task, arguments, error, words):
    with pytest.raises(error, match=words) as raised:
        Harness(**arguments)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_run_on_a_model_is_refused_in_one_line(
    models, tokenizer, include, monkeypatch, tmp_path
):
    scores = Harness(["writes_much"], include=include).scores
    with pytest.raises(ConfigError, match="writes up to 5000 tokens, and the model has 256 pos"):
        scores(models["attached"], tokenizer)
    with pytest.raises(ConfigError, match="limit=0"):
        scores(models["attached"], tokenizer, limit=0)
    with pytest.raises(ConfigError, match="this model has none"):
        scores(bare("llama"), tokenizer, memory=False)
    with pytest.raises(ConfigError, match="'runs_code' runs code .* allow it with HF_ALLOW_CODE"):
        Harness(["runs_code"], include=include)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    Harness(["runs_code"], include=include)
    damaged = {"task": "damaged", "dataset_path": "json", "test_split": "test"}
    damaged["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "none.jsonl")}}
    (tmp_path / "damaged.yaml").write_text(yaml.safe_dump(damaged))
    with pytest.raises(DataError, match="'damaged' cannot be loaded: .*none.jsonl"):
        Harness(["damaged"], include=tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'engram-lm\[evaluate\]'"):
        Harness(["writes"], include=include)


def evaluated(capsys, *arguments: object) -> dict:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_gives_both_columns_and_writes_them(
    capsys, models, tokenizer, saved, include, tmp_path, kind
):
    out = tmp_path / "scores.json"
    tasks = ["facts", "engram_wordnet_bpb"]
    options = ["--tasks", ",".join(tasks), "--include", include, "--limit=4", "--batch-size=3"]
    found = evaluated(capsys, saved[kind], *options, "--memory=both", "--out", out)
    assert json.loads(out.read_text()) == found and os.listdir(tmp_path) == [out.name]
    harness = Harness(tasks, include=include)
    for column, on in OFF.items():
        wanted = harness.scores(models[kind], tokenizer, memory=on, limit=4, batch=3)
        assert [row["metric"] for row in found["scores"]] == [score.metric for score in wanted]
        values = [row[f"{column}_value"] for row in found["scores"]]
        assert values == pytest.approx([score.value for score in wanted], abs=1e-6)
    for row in found["scores"]:
        assert row["difference"] == row["on_value"] - row["off_value"]
    assert (
        main(["eval", str(saved[kind]), *map(str, options), "--memory=off", "--set=tasks.shots=0"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "bits_per_byte ↓" in printed and f"{values[-1]:.4f}" in printed
    assert "memory off" in printed and "memory on" not in printed
    assert "±: lm_eval's standard error" in " ".join(printed.split())


def test_mistakes_on_the_command_line_are_one_line(capsys, saved, tmp_path):
    def refused(*arguments: object) -> str:
        assert main(["eval", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert not captured.out and captured.err.count("\n") == 1
        return captured.err

    tasks = "--tasks=engram_wordnet_bpb"
    assert "no config.json" in refused(tmp_path / "none", tasks)
    bare("llama", vocab_size=8192).save_pretrained(tmp_path / "bare")
    assert "no tokenizer" in refused(tmp_path / "bare", tasks)
    corpus.tokenizer().save_pretrained(tmp_path / "bare")
    assert "memory='both': this model has none" in refused(
        tmp_path / "bare", tasks, "--memory=both"
    )
    assert evaluated(capsys, tmp_path / "bare", tasks, "--limit=2")["memory"] is None
    assert "no such directory" in refused(saved["ours"], tasks, f"--out={tmp_path}/none/a.json")
    assert "limit=0" in refused(saved["ours"], tasks, "--limit=0")


COMMAND = (
    "lm_eval run --model hf --device cpu --model_args pretrained=DIR,trust_remote_code=True "
    "--include_path \"$(python -c 'from engram_lm.evaluate.harness import TASKS; print(TASKS)')\" "
    "--tasks engram_wordnet_bpb,engram_wordnet_definitions --batch_size 8 --output_path scores"
)
"""As docs/ecosystem.md gives it."""


def test_lm_evals_own_command_opens_both_kinds_from_their_directories(
    models, tokenizer, saved, tmp_path
):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    running = {}
    for kind, directory in saved.items():
        (tmp_path / kind).mkdir()
        home = str(tmp_path / kind / "home")
        running[kind] = subprocess.Popen(
            ["sh", "-c", f"{COMMAND.replace('DIR', str(directory))} --limit 5"],
            env={**os.environ, **OFFLINE, "PATH": path, "HF_HOME": home},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path / kind,
        )
    harness = Harness(["engram_wordnet_bpb", "engram_wordnet_definitions"])
    for kind, process in running.items():
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        (file,) = (tmp_path / kind / "scores").rglob("results*.json")
        found = json.loads(file.read_text())["results"]
        for score in harness.scores(models[kind], tokenizer, limit=5, batch=8):
            value = found[score.task][f"{score.metric},none"]
            assert value == pytest.approx(score.value, abs=1e-5)


def test_nothing_of_lm_eval_is_imported_before_it_is_needed():
    code = (
        "import sys, engram_lm.cli, engram_lm.evaluate.harness\n"
        "engram_lm.cli.parser()\n"
        "assert not {'lm_eval', 'datasets', 'torch.distributed.elastic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
