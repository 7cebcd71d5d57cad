"""`engram analyze`, and a verb for each of its parts: what a model's memory does, and a report."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from engram_lm.cli.evaluate_suites import NAMES, QUESTIONS, Asking, named, suites
from engram_lm.cli.models import (
    check_distinct,
    memory_options,
    memory_places,
    open_model,
    open_tokenizer,
    opening,
)
from engram_lm.cli.settings import changed_fields, prepare, progress_bars, setting, settings
from engram_lm.errors import ConfigError, DataError

HELP = "Measure what a model's memory does; write a report with figures."
BANDS = "frequency_bands"


def options(add: Callable[..., Any]) -> None:
    _shared(add)
    add("--out", type=Path, required=True, help="directory of report.html, analysis.json, figures/")
    add(
        "--parts",
        help="a,b of gates, lens, bands, addresses, alignment, ablation, suites (default: all that "
        "can be measured but ablation)",
    )


def run(arguments: argparse.Namespace) -> None:
    parts = arguments.parts
    _run(arguments, None if parts is None else [part for part in parts.split(",") if part])


class Part:
    """A verb that measures one part alone and prints it."""

    def __init__(self, name: str, said: str) -> None:
        self.name, self.HELP = name, said

    def options(self, add: Callable[..., Any]) -> None:
        _shared(add)
        add("--out", type=Path, help="directory to write a report of this part into")
        if self.name == "gates":
            add("--sentence", action="append", metavar="TEXT", help="to colour; may be repeated")

    def run(self, arguments: argparse.Namespace) -> None:
        _run(arguments, [self.name])


gates = Part("gates", "Colour a text by its gates; say what they tell apart.")
lens = Part("lens", "Read each block's prediction (LogitLens): how far it is from the final one.")
bands = Part("bands", "Split the loss by how often the n-gram stood in a corpus.")
addresses = Part("addresses", "Count which n-grams of a corpus share rows, beside what to expect.")
alignment = Part("alignment", "Compare the blocks of two models (CKA), beside two seeds of one.")
ablation = Part("ablation", "Take each part of a memory away: what its absence costs.")


def _shared(add: Callable[..., Any]) -> None:
    add("models", nargs="+", type=Path, metavar="MODEL", help="directory; several are its seeds")
    add("--against", nargs="+", type=Path, default=[], metavar="OTHER", help="to compare with")
    add("--text", type=Path, help="file to read: one document, or .jsonl (default: WordNet's)")
    add(
        "--corpus",
        type=Path,
        help="file to count n-grams in: best what was trained on (default: WordNet's, and without "
        "--text only)",
    )
    memory_options(add)
    setting(add, "analyze.tokens=32768, suites.names=two_source, two_source.entities=1500")


def _run(arguments: argparse.Namespace, parts: list[str] | None) -> None:
    from engram_lm.analysis.analyze import analyze
    from engram_lm.analysis.material import Sizes
    from engram_lm.analysis.report import write_report
    from engram_lm.cli.analysis_tables import show
    from engram_lm.memory.canonical import backend_of
    from engram_lm.train.provenance import machine

    changes = settings(arguments.set, ("analyze", "suites", *NAMES))
    sizes = changed_fields("analyze", Sizes(), changes.pop("analyze"))
    asking, heads = _asking(changes)
    if asking.names and parts is not None and "suites" not in parts:
        parts = [*parts, "suites"]
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise DataError(f"{arguments.out}: not a directory")
    check_distinct([*arguments.models, *arguments.against])
    prepare(None)
    subject, tokenizer = _subject(arguments.models, arguments)
    against = None
    if arguments.against:
        against, other = _subject(arguments.against, arguments, apart_from=subject.name)
        if backend_of(other).to_str() != backend_of(tokenizer).to_str():
            raise ConfigError(f"{arguments.against[0]}: another tokenizer than {subject.name} has")
    with Console(stderr=True).status("reading texts"):
        material = _material(tokenizer, arguments, sizes)
        asked = suites(asking, subject.models[0], tokenizer)
        material = replace(
            material, suites=tuple(asked.values()), questions=asking.questions, heads=heads
        )
    with progress_bars() as bars:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, of: int) -> None:
            group = what.partition(":")[0]
            if group not in tasks:
                tasks[group] = bars.add_task(group, total=of, note="")
            bars.update(tasks[group], completed=done, total=of, note=what.partition(":")[2])

        found = analyze(subject, tokenizer, material, against=against, parts=parts, progress=tell)
    if arguments.out is not None:
        command = "$ engram " + shlex.join(sys.argv[1:])
        path = write_report(arguments.out, found, command=command, about=machine())
    if arguments.json:
        print(json.dumps(asdict(found), ensure_ascii=False, allow_nan=False))
        return
    show(found, Console())
    if arguments.out is not None:
        Console().print(f"report: {path.resolve()}", soft_wrap=True)


def _asking(changes: dict[str, dict[str, Any]]) -> tuple[Asking, bool]:
    """Of --set suites.names=a,b, suites.questions=N and the suites' own fields; and of
    suites.heads=true, whether they are asked with each head off."""
    own = changes.pop("suites")
    names, questions = own.pop("names", None), own.pop("questions", QUESTIONS)
    heads = own.pop("heads", False)
    counted = isinstance(questions, int) and not isinstance(questions, bool) and questions > 0
    if own or not isinstance(names, str | None) or not counted or not isinstance(heads, bool):
        raise ConfigError(
            "suites: suites.names=a,b, suites.questions=1 or more and suites.heads=true or false "
            "are accepted"
        )
    if names is not None and BANDS in names.split(","):
        raise ConfigError(f"suites.names={names}: {BANDS} is a part of its own, bands")
    files = changes["minimal_pairs"].pop("files", None)
    for field in changes["minimal_pairs"]:
        raise ConfigError(f"minimal_pairs.{field}: unknown; minimal_pairs.files is accepted")
    found = named(names, changes)
    asking = Asking(names=found, changes=changes, files=files, questions=questions, seed=0, batch=8)
    return asking, heads


def _subject(
    paths: Sequence[Path], arguments: argparse.Namespace, apart_from: str = ""
) -> tuple[Any, Any]:
    from transformers import AutoConfig

    from engram_lm.analysis.analyze import Subject
    from engram_lm.memory.canonical import backend_of

    models, tokenizers = [], []
    for path in paths:
        with opening(path):
            config: Any = AutoConfig.from_pretrained(path)
            bare = getattr(config, "memory_config", None) is None
            # What is compared with may have no memory to leave on disk; the subject is told.
            places = {} if bare and apart_from else memory_places(arguments)
            tokenizers.append(open_tokenizer(path))
            models.append(open_model(path, places).eval())
    tokenizer = tokenizers[0]
    if len({backend_of(each).to_str() for each in tokenizers}) > 1:
        raise ConfigError(f"{paths[0]} and others: seeds of one model have one tokenizer")
    if len({_shape(model) for model in models}) > 1:
        raise ConfigError(f"{paths[0]} and others: seeds of one model have one configuration")
    first = paths[0].resolve()
    name = first.parent.name if first.name == "model" else first.name
    return Subject(name=str(paths[0]) if name == apart_from else name, models=models), tokenizer


def _shape(model: Any) -> str:
    """All of a configuration but where and by what it was saved."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    return json.dumps(config, sort_keys=True, default=str)


def _material(tokenizer: Any, arguments: argparse.Namespace, sizes: Any) -> Any:
    from engram_lm.analysis import material

    if arguments.text is None:
        found = material.wordnet(tokenizer, sizes)
    else:
        found = material.read(arguments.text, tokenizer, sizes)
    if arguments.corpus is not None:
        counted = material.stream(material.parts(arguments.corpus), tokenizer)
        tokens = len(counted["corpus_C"])
        if not tokens:
            raise DataError(f"{arguments.corpus}: no text")
        name = f"{arguments.corpus.name} ({tokens:,} tokens)"
        found = replace(found, corpus=name, **counted)
    sentences = getattr(arguments, "sentence", None)  # `engram gates` alone has it
    return found if sentences is None else replace(found, sentences=tuple(sentences))
