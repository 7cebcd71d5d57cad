"""A small pre-trained backbone learns a new domain: memory, LoRA, or all of its parameters.

    python recipes/retrofit.py

An ordinary Llama is trained on the WordNet corpus; then, from the same weights, each arm learns the
docstrings of Python's standard library (recipes/retrofit_text.py) from equal data in equal order:
`memory` (attached, the backbone frozen), `lora_flops` (LoRA of equal trainable FLOPs per token),
`lora_parameters` (LoRA with as many parameters as the memory has, rows and fusion), `full` (all
parameters) and `memory_lora` (memory and the LoRA of `lora_flops`). recipes/retrofit_arms.py has
the formulas.

Judged by bits per byte on the new domain and by forgetting: how far bits per byte on the old one
(WordNet's validation part) rise above the backbone's. Each arm's learning rate is the best of three
on the new domain's validation part, searched with the first seed; the old domain has no say in it.
A seed sets the backbone's weights, what is drawn for an arm, and the order of the data.

Trains into runs/retrofit (about 45 minutes on two quiet cores; goes on where it was interrupted)
and writes results/retrofit.json with its figure. --smoke: minutes become seconds, and the numbers
mean nothing. The last line printed is the summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import retrofit_text
import torch
from retrofit_arms import (
    APART,
    ARMS,
    RATES,
    SEARCHED,
    Sizes,
    arm_of,
    bits_per_byte,
    costs,
    frozen,
    next_rate,
    seconds_a_token,
    sha256,
    small,
    teach,
)
from retrofit_figure import draw
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_model, save_model

from engram_lm import CanonicalMap, corpus, whole
from engram_lm.analysis.student import PLUS_MINUS, spread
from engram_lm.errors import DataError
from engram_lm.precision import choose
from engram_lm.studies.record import Record
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.config import TrainConfig
from engram_lm.train.console import Display
from engram_lm.train.stream import Continuous

SMOKE = Sizes(
    width=32,
    layers=2,
    attention_heads=2,
    memory_layers=(0, 1),
    rows=50,
    heads=2,
    head_dim=5,
    batch=4,
    context=32,
    backbone_tokens=640,
    tokens=512,
    judged=300,
    modules=30,
)
MEASURES = ("new_bpb", "old_bpb", "forgetting")
DECAY = 0.1
"""Weight decay of the backbone's matrices; arms have none."""
JUDGING = 1 / 3
"""Of a token's training time, what judging takes."""


class Study:
    """All runs of some seeds, each kept in a file of its own as soon as it is done."""

    def __init__(self, sizes: Sizes, seeds: list[int], out: Path, console: Console) -> None:
        self.sizes, self.seeds, self.console = sizes, seeds, console
        with console.status("reading the standard library and the WordNet corpus"):
            text = retrofit_text.read(sizes.modules)
            ids = {part: retrofit_text.encoded(text[part]) for part in retrofit_text.PARTS}
            old = corpus.tokens("train", sizes.backbone_tokens + 1).ids
            self.judged = {
                "validation_bpb": ids["validation"][: sizes.judged],
                "new_bpb": ids["test"][: sizes.judged],
                "old_bpb": corpus.tokens("validation", sizes.judged).ids,
            }
        self.old = Continuous(old, corpus.token_bytes())
        self.new = Continuous(ids["train"], corpus.token_bytes())
        if len(self.new) <= sizes.tokens:
            raise DataError(
                f"{len(self.new)} tokens of docstrings to train on: {sizes.tokens} are needed"
            )
        self.canonical = CanonicalMap.from_tokenizer(corpus.tokenizer())
        self.facts = {
            "python": platform.python_version(),
            # Part of the directory's name: arms of one comparison are of one precision.
            "precision": choose("auto").name,
            "text_sha256": retrofit_text.sha256(text),
            "modules": {part: len(text[part]) for part in text},
            "tokens": {part: len(ids[part]) for part in ids},
            "judged_tokens": {name: len(each) for name, each in self.judged.items()},
            "sizes": asdict(sizes),
            "first_rates": RATES,
            "ranks_wanted": sizes.ranks,
            "ranks": {arm: sizes.rank(arm) for arm in sizes.ranks},
            "rank_limited_by_width": [arm for arm, r in sizes.ranks.items() if r > sizes.width],
        }
        # A run's own rate is in its file's name: where the search began makes no other run.
        of_runs = {name: value for name, value in self.facts.items() if name != "first_rates"}
        settings = json.dumps(of_runs, sort_keys=True).encode()
        self.out = out / hashlib.sha256(settings).hexdigest()[:12]
        judging = JUDGING * sum(map(len, self.judged.values()))
        self.arm_work, self.backbone_work = (
            tokens + judging for tokens in (sizes.tokens, sizes.backbone_tokens)
        )
        """Of a run, in tokens trained on."""
        arms = len(ARMS) * (SEARCHED + len(seeds) - 1)
        self.left = len(seeds) * self.backbone_work + arms * self.arm_work
        self.seen: set[Path] = set()

    def run(self) -> dict[str, Any]:
        """Seed -> backbone, its arms, and rates tried for them; trains what is not trained yet."""
        found: dict[str, Any] = {}
        rates: dict[str, float] = {}
        for seed in self.seeds:
            backbone, facts = self.backbone(seed)
            arms: dict[str, Any] = {}
            searched: dict[str, Any] = {}
            for arm in ARMS:
                if arm not in rates:
                    searched[arm] = self.search(arm, seed, backbone)
                    rates[arm] = min(searched[arm], key=lambda each: each["validation_bpb"])["lr"]
                arms[arm] = self.arm(arm, rates[arm], seed, backbone)
            orders = {each["order_sha256"] for each in arms.values()}
            if len(orders) != 1:
                raise DataError(f"seed {seed}: the arms saw {len(orders)} orders of the data")
            found[str(seed)] = {"backbone": facts, "arms": arms, "searched": searched}
        return found

    def backbone(self, seed: int) -> tuple[Any, dict[str, Any]]:
        """A Llama trained on the old domain, and how it is judged."""
        sizes, weights = self.sizes, self.out / f"seed-{seed}" / "backbone.safetensors"
        model = small(sizes, seed)
        if not self.seen:
            self.tell_time(1 / seconds_a_token(model, sizes))

        def make() -> dict[str, Any]:
            config = sizes.config(sizes.backbone_tokens, sizes.backbone_rate, seed)
            record = self.taught(f"seed {seed} backbone", model, self.old, config, DECAY)
            with whole.aside(weights) as partial:
                save_model(model, str(partial))
            return record

        facts = self.kept(weights.with_suffix(".json"), self.backbone_work, make)
        load_model(model, str(weights))
        return model, facts

    def search(self, arm: str, seed: int, backbone: Any) -> list[dict[str, Any]]:
        """The arm with each learning rate that was tried."""
        found: dict[float, dict[str, Any]] = {}
        while True:
            rate = next_rate(arm, {lr: each["validation_bpb"] for lr, each in found.items()})
            if rate is None:
                return list(found.values())
            found[rate] = self.arm(arm, rate, seed, backbone)

    def arm(self, arm: str, rate: float, seed: int, backbone: Any) -> dict[str, Any]:
        """One run: what it took and how it is judged."""

        def make() -> dict[str, Any]:
            model = arm_of(arm, backbone, self.sizes, seed, self.canonical)
            spent, still = costs(model, self.sizes), frozen(model)
            before = sha256(still)
            name = f"seed {seed} {arm} {rate:g}"
            config = self.sizes.config(self.sizes.tokens, rate, seed)
            record = self.taught(name, model, self.new, config, 0.0)
            if sha256(still) != before:
                raise DataError(f"{name}: frozen parameters have changed")
            return {**record, **spent, "frozen_sha256": before}

        path = self.out / f"seed-{seed}" / f"{arm}-{rate:g}.json"
        return self.kept(path, self.arm_work, make)

    def taught(
        self, name: str, model: Any, stream: Continuous, config: TrainConfig, decay: float
    ) -> dict[str, Any]:
        """Trains a model and judges it."""
        with Display([name], [config.steps], [0], self.console) as display:
            taught = teach(model, stream, config, decay, lambda record: display.show(0, record))
        judged = {
            each: bits_per_byte(model, ids_T, self.sizes) for each, ids_T in self.judged.items()
        }
        return {"lr": config.lr, **judged, **taught._asdict()}

    def kept(self, path: Path, work: float, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the file holds, or else what is made, which it holds from then on."""
        if path not in self.seen:
            self.seen.add(path)
            self.left -= work
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            begun = time.perf_counter()
            record = make()
            whole.write(path, json.dumps(record, allow_nan=False) + "\n")
            self.tell_time(work / (time.perf_counter() - begun))
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def tell_time(self, speed: float) -> None:
        """At `speed` tokens a second."""
        self.console.print(f"about {self.left / speed / 60:.0f} minutes left")


def summarise(found: dict[str, Any], facts: dict[str, Any]) -> dict[str, float]:
    """Flat: name -> number. `spread` over seeds, of differences seed by seed."""
    values: dict[str, list[float]] = {}
    for seed in found.values():
        before = seed["backbone"]
        arms = {
            arm: {**each, "forgetting": each["old_bpb"] - before["old_bpb"]}
            for arm, each in seed["arms"].items()
        }
        for measure in ("new_bpb", "old_bpb"):
            values.setdefault(f"backbone_{measure}", []).append(before[measure])
        for arm, each in arms.items():
            for measure in (*MEASURES, "tokens_per_second"):
                values.setdefault(f"{arm}_{measure}", []).append(each[measure])
            values.setdefault(f"{arm}_gain", []).append(before["new_bpb"] - each["new_bpb"])
            for measure in MEASURES if arm != "memory" else ():
                name = f"memory_minus_{arm}_{measure}"
                values.setdefault(name, []).append(arms["memory"][measure] - each[measure])
    flat: dict[str, float] = {"seeds": len(found)}
    for name, by_seed in values.items():
        flat |= {f"{name}_{what}": value for what, value in spread(by_seed).items()}
    first = next(iter(found.values()))
    for arm, each in first["arms"].items():
        rates = [tried["lr"] for tried in first["searched"][arm]]
        flat[f"{arm}_lr"] = each["lr"]
        flat[f"{arm}_lr_at_edge"] = float(each["lr"] in (min(rates), max(rates)))
        for name in ("trained_parameters", "trainable_flops", "step_flops"):
            if name in each:
                flat[f"{arm}_{name}"] = each[name]
    flat["backbone_parameters"] = first["arms"]["memory"]["backbone_parameters"]
    flat["tokens"] = first["arms"]["memory"]["tokens"]
    flat["rate_ratio"] = APART
    for arm, rank in facts["ranks"].items():
        flat[f"{arm}_rank"], flat[f"{arm}_rank_wanted"] = rank, facts["ranks_wanted"][arm]
    for part, tokens in facts["tokens"].items():
        flat[f"new_domain_{part}_tokens"] = tokens
    for name, tokens in facts["judged_tokens"].items():
        flat[f"{name}_tokens"] = tokens
    return flat


def show(flat: dict[str, float], console: Console) -> None:
    """The summary as tables for a reader."""

    def cell(name: str) -> str:
        half = flat.get(f"{name}_t95")  # one seed has none
        return f"{flat[f'{name}_mean']:.4f}" + ("" if half is None else f" ± {half:.4f}")

    judged, spent = Table(title=f"bits per byte, {PLUS_MINUS}"), Table()
    for table, columns in (
        (judged, ("", "new domain", "old domain", "forgetting")),
        (spent, ("", "learning rate", "trained", "trainable FLOPs", "tokens/s")),
    ):
        table.box = None
        for column in columns:
            table.add_column(column, justify="right" if column else "left")
    judged.add_row("backbone", cell("backbone_new_bpb"), cell("backbone_old_bpb"))
    for arm, label in ARMS.items():
        judged.add_row(label, *(cell(f"{arm}_{measure}") for measure in MEASURES))
        rate = ("at edge " if flat[f"{arm}_lr_at_edge"] else "") + f"{flat[f'{arm}_lr']:g}"
        flops = flat.get(f"{arm}_trainable_flops")
        spent.add_row(
            label,
            rate,
            f"{flat[f'{arm}_trained_parameters']:,}",
            "" if flops is None else f"{flops:,}",
            f"{flat[f'{arm}_tokens_per_second_mean']:,.0f}",
        )
    console.print(judged, "", spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, into retrofit-smoke")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    console = Console(stderr=True)
    name = "retrofit-smoke" if arguments.smoke else "retrofit"
    record = Record(name, precision="auto")
    sizes = SMOKE if arguments.smoke else Sizes()
    study = Study(sizes, arguments.seeds, Path("runs") / name, console)
    found = study.run()
    flat = summarise(found, study.facts)
    record.write(flat, {"facts": study.facts, "runs": found}, seeds=arguments.seeds)
    draw(found, record.path)
    show(flat, console)
    print(json.dumps(flat))


if __name__ == "__main__":
    main()
