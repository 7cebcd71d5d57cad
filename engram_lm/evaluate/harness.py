"""lm-evaluation-harness on a model with memory: its tasks, ours (`tasks/`) and a user's.

lm_eval is an extra (`pip install engram-lm[evaluate]`) and imported when a harness is made.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluate.inference import inference

TASKS = Path(__file__).with_name("tasks")
"""Our own task files, for `lm_eval run --include_path`."""
RUN_CODE = "HF_ALLOW_CODE_EVAL"
"""Environment variable with which users allow a metric to run what a model wrote."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of a task, or of a group as the mean over its tasks."""

    task: str
    metric: str
    """As lm_eval writes it; its filter stands after a comma where there is one."""
    value: float
    stderr: float | None
    shots: int | None
    """Examples before each question; None for a group whose tasks differ."""
    documents: int | None
    higher_is_better: bool | None


class Harness:
    """Tasks of lm_eval, loaded once, to be run on one model after another.

    tasks: names of tasks, groups or tags, patterns ("blimp_*"), or task files. `include`: a
    directory of further task files, which come before lm_eval's. `shots`: other than the tasks'
    own; a task that says 0 keeps it. ConfigError for names that are no task and where lm_eval is
    not installed, DataError where a task's data cannot be had.
    """

    def __init__(
        self, tasks: Sequence[str], *, include: Path | None = None, shots: int | None = None
    ) -> None:
        if find_spec("lm_eval") is None:
            raise ConfigError("lm_eval is not installed: pip install 'engram-lm[evaluate]'")
        if shots is not None and shots < 0:
            raise ConfigError(f"shots={shots}: 0 or more")
        if include is not None and not include.is_dir():
            raise ConfigError(f"include={str(include)!r}: no such directory")
        self.shots = shots
        self._manager, names = _resolved(tuple(tasks), include)
        self._tasks, self._roots = _loaded(self._manager, names)

    def scores(
        self,
        model: Any,
        tokenizer: Any,
        *,
        memory: bool = True,
        limit: int | None = None,
        batch: int = 1,
    ) -> list[Score]:
        """Every metric of every task, in lm_eval's order.

        memory: False for the backbone alone. `limit`: documents of each task, the first ones.
        Sampling and few-shot examples are drawn by lm_eval's own seeds, which it sets for the
        process. ConfigError for a model without memory that is to be judged without it, and where
        a task's answers do not fit the model's context.
        """
        if (limit is not None and limit < 1) or batch < 1:
            raise ConfigError(f"limit={limit}, batch={batch}: at least 1")
        if not memory and getattr(model.config, "memory", None) is None:
            raise ConfigError("memory=False: this model has none")
        from lm_eval import simple_evaluate

        from engram_lm.evaluate.harness_reader import HarnessReader

        # What lm_eval prints is no answer: it goes where its progress goes.
        with (
            inference(model),
            nullcontext() if memory else model.base_model.without_memory(),
            redirect_stdout(sys.stderr),
        ):
            with _quiet():
                reader = HarnessReader(model, tokenizer, batch)
            self._check_lengths(reader)
            found: Any = simple_evaluate(
                model=reader,
                tasks=self._roots,
                task_manager=self._manager,
                num_fewshot=self.shots,
                limit=limit,
                log_samples=False,
                confirm_run_unsafe_code=os.environ.get(RUN_CODE) == "1",
            )
        return [score for name in found["results"] for score in _scores(found, name)]

    def _check_lengths(self, reader: Any) -> None:
        for name, task in self._tasks.items():
            if task.config.output_type == "generate_until":
                tokens = task.config.generation_kwargs.get("max_gen_toks", reader.max_gen_toks)
                if tokens >= reader.max_length:
                    raise ConfigError(
                        f"task {name!r} writes up to {tokens} tokens, and the model has "
                        f"{reader.max_length} positions: give the task less max_gen_toks"
                    )


@cache
def _manager(include: Path | None, builtin: bool) -> Any:
    """lm_eval's list of tasks. Its own are many files, whose reading takes seconds."""
    from lm_eval.tasks import TaskManager

    paths: Any = [TASKS, *([] if include is None else [include])]
    return TaskManager(include_path=paths, include_defaults=builtin)


def _resolved(tasks: tuple[str, ...], include: Path | None) -> tuple[Any, list[str]]:
    """The list that has these tasks, and their names."""
    for builtin in (False, True):
        manager = _manager(include, builtin)
        if all(_closed(manager.task_index, task) for task in tasks):
            break
    names: list[str] = []
    for task in tasks:
        matched = manager.match_tasks([task]) or ([task] if Path(task).is_file() else [])
        if not matched:
            closest = get_close_matches(task, manager.all_tasks, 1, cutoff=0)
            raise ConfigError(f"task {task!r}: unknown; the closest is {''.join(closest)!r}")
        names += [name for name in matched if name not in names]
    if not names:
        raise ConfigError("tasks: none are named")
    return manager, names


def _closed(index: Any, item: Any) -> bool:
    """Whether a task, or a group with all of its members, is in this list."""
    if isinstance(item, dict):
        members = item.get("task")
        if not isinstance(members, list):
            return _closed(index, members or item.get("group"))
        return all(_closed(index, member) for member in members)
    entry = index.get(item)
    if entry is None or entry.cfg is None:  # a tag, which other lists may give more tasks
        return False
    return not isinstance(entry.cfg.get("task"), list) or _closed(index, entry.cfg)


def _loaded(manager: Any, names: Iterable[str]) -> tuple[dict[str, Any], list[Any]]:
    """Tasks by name, and what was asked for: tasks and groups."""
    tasks: dict[str, Any] = {}
    roots: list[Any] = []
    for name in names:
        try:
            with _quiet():
                loaded = manager.load([name])
        except (OSError, ValueError, KeyError, TypeError, ImportError, yaml.YAMLError) as error:
            # Data that cannot be reached, packages that a task needs, damaged task files.
            raise DataError(
                f"task {name!r} cannot be loaded: {type(error).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from error
        groups, inner = loaded.get("groups", {}), set[str]()
        for children in loaded.get("group_map", {}).values():
            inner.update(children)
        for key, each in {**groups, **loaded["tasks"]}.items():
            if key not in inner:
                roots.append(each)
        tasks |= loaded["tasks"]
    for name, task in tasks.items():
        if task.config.unsafe_code and os.environ.get(RUN_CODE) != "1":
            raise ConfigError(
                f"task {name!r} runs code that the model writes: allow it with {RUN_CODE}=1"
            )
    return tasks, roots


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm_eval's remarks on custom data sets and on models that are objects."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _scores(found: Any, name: str) -> list[Score]:
    record = found["results"][name]
    better = found["higher_is_better"].get(name, {})
    scores = []
    for key, value in record.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = record.get(f"{metric}_stderr,{kind}")
        scores.append(
            Score(
                task=name,
                metric=metric if kind == "none" else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                shots=found["n-shot"].get(name),
                documents=record.get("sample_len"),
                higher_is_better=better.get(metric),
            )
        )
    return scores
