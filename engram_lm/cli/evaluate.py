"""`engram eval`: suites of ours and tasks of lm-evaluation-harness on saved models, with memory and
without."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from engram_lm import whole
from engram_lm.cli import evaluate_suites, evaluate_tasks
from engram_lm.cli.models import check_distinct, open_model, open_tokenizer, opening
from engram_lm.cli.settings import prepare, setting, settings
from engram_lm.errors import ConfigError, DataError, MismatchError

if TYPE_CHECKING:
    from engram_lm.evaluate.harness import Score
    from engram_lm.evaluate.suite_scores import SuiteScore

HELP = "Run our suites and tasks of lm-evaluation-harness, with memory, without, or both."
OTHERS: dict[str, tuple[type, ...]] = {
    "suites.seed": (int,),
    "minimal_pairs.files": (str, list),
    "tasks.shots": (int,),
    "memory.budget": (str, int),
}
"""What --set knows beside the suites' own fields. A budget leaves rows on disk."""
COLUMNS = {"on": ("on",), "off": ("off",), "both": ("on", "off")}


def options(add: Callable[..., Any]) -> None:
    add(
        "directories",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="where save_pretrained wrote; several are one model, trained with several seeds",
    )
    add("--suites", help=f"of ours: a,b of {', '.join(evaluate_suites.NAMES)}")
    add("--tasks", help="of lm-evaluation-harness: names of tasks or groups, or task files: a,b")
    add(
        "--memory",
        choices=tuple(COLUMNS),
        default="on",
        help="off: the backbone alone; both: two columns (default: %(default)s)",
    )
    add("--limit", type=int, help="documents of a task, questions of a suite's kind (all, 200)")
    add("--include", type=Path, metavar="DIR", help="a directory of task files of your own")
    add("--batch-size", type=int, default=8, help="texts read at once (default: %(default)s)")
    setting(add, f"two_source.entities=1500; also {', '.join(OTHERS)}")
    add("--out", type=Path, metavar="FILE", help="write the scores there, as JSON")


def run(arguments: argparse.Namespace) -> None:
    directories, out = arguments.directories, arguments.out
    _check(arguments)
    changes = settings(arguments.set, (*evaluate_suites.NAMES, "suites", "tasks", "memory"))
    for group, given in (("tasks", arguments.tasks), ("suites", arguments.suites)):
        if changes[group] and not given:
            raise ConfigError(f"--set {group}.{next(iter(changes[group]))}: without --{group}")
    others = _others(changes)
    prepare(None)
    asking = evaluate_suites.Asking(
        names=evaluate_suites.named(arguments.suites, changes),
        changes=changes,
        files=others["minimal_pairs.files"],
        questions=evaluate_suites.QUESTIONS if arguments.limit is None else arguments.limit,
        seed=others["suites.seed"] or 0,
        batch=arguments.batch_size,
    )
    evaluate_suites.suites(asking)  # what is wrong with them is said before a model is opened
    harness = None
    if arguments.tasks:
        harness = evaluate_tasks.harness(arguments, others["tasks.shots"])
    columns = COLUMNS[arguments.memory]
    suite_scores: dict[str, list[list[SuiteScore]]] = {column: [] for column in columns}
    task_scores: dict[str, list[list[Score]]] = {column: [] for column in columns}
    record: dict[str, Any] = {}
    kinds = set()
    for directory in directories:
        with Console(stderr=True).status(f"opening {directory}"):
            model, tokenizer = _opened(directory, others["memory.budget"])
        has_memory = getattr(model.config, "memory", None) is not None
        if not has_memory and arguments.memory != "on":
            raise ConfigError(f"memory={arguments.memory!r}: this model has none")
        if not has_memory and others["memory.budget"] is not None:
            raise ConfigError(
                f"memory.budget={others['memory.budget']!r}: this model has no memory"
            )
        kinds.add((type(model), model.config.vocab_size, has_memory))
        if len(kinds) > 1:
            raise MismatchError(f"{directory}: not the model of {directories[0]} with another seed")
        suites = evaluate_suites.suites(asking, model, tokenizer)
        found = evaluate_suites.scored(model, tokenizer, suites, columns, asking)
        for column in columns:
            suite_scores[column].append(found[column])
            if harness is not None:
                task_scores[column].append(
                    harness.scores(
                        model,
                        tokenizer,
                        memory=column == "on",
                        limit=arguments.limit,
                        batch=arguments.batch_size,
                    )
                )
        record = {
            "command": "eval",
            "models": [str(each) for each in directories[: len(suite_scores[columns[0]])]],
            "memory": arguments.memory if has_memory else None,
            "batch_size": arguments.batch_size,
            "tasks": evaluate_tasks.names(arguments),
            "limit": arguments.limit,
            "scores": evaluate_tasks.rows(task_scores),
            "suites": {name: evaluate_suites.described(suite) for name, suite in suites.items()},
            "questions": asking.questions,
            "seed": asking.seed,
            "suite_scores": evaluate_suites.rows(suite_scores),
        }
        if out is not None:  # after each model: the others may take hours
            whole.write(out, json.dumps(record, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(record))
        return
    if asking.names:
        evaluate_suites.show(record, columns)
    if harness is not None:
        evaluate_tasks.show(record, columns)


def _check(arguments: argparse.Namespace) -> None:
    out = arguments.out
    if not arguments.tasks and not arguments.suites:
        raise ConfigError(
            f"--suites or --tasks is needed; suites are {', '.join(evaluate_suites.NAMES)}"
        )
    check_distinct(arguments.directories)
    for name, value in (("limit", arguments.limit), ("batch_size", arguments.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: at least 1")
    if out is not None and not out.parent.is_dir():
        raise DataError(f"{out}: no such directory as {out.parent}")


def _others(changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Those of OTHERS, None where they are not set; taken out of `changes`."""
    found = dict.fromkeys(OTHERS)
    for group in ("minimal_pairs", "suites", "tasks", "memory"):
        for key, value in changes.pop(group).items():
            name = f"{group}.{key}"
            if name not in OTHERS:
                raise ConfigError(f"{name}: unknown; accepted are {', '.join(OTHERS)}")
            if type(value) not in OTHERS[name]:
                kinds = " or ".join(kind.__name__ for kind in OTHERS[name])
                raise ConfigError(f"{name}={value!r}: {kinds} is needed")
            found[name] = value
    return found


def _opened(directory: Path, budget: str | int | None) -> tuple[Any, Any]:
    with opening(directory):
        tokenizer = open_tokenizer(directory)
        places = {"memory": None if budget is None else "disk", "memory_budget": budget}
        model = open_model(directory, places)
    return model, tokenizer
