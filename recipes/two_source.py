"""Facts that were trained and facts in the context: what is left of each when memory is off.

    python recipes/two_source.py                         # the demo's twins
    python recipes/two_source.py --study text            # a pair of 8M parameters, with WordNet
    python recipes/two_source.py --seeds 1 --arms MoE    # one run; another sitting does another

A MoE and an Engram model of equal parameters and FLOPs (two_source_studies.py) are trained from
scratch on the documents of engram_lm/evaluate/suites/two_source.py: half of them state facts that
never change, half state facts drawn anew and ask for them. Then each is asked for both, as it is
and with parts switched off: the Engram arm without its memory and each of its parts, and as a
control the MoE without the routed experts of one layer, each layer in turn. Retention is raw, as
the paper has it, and above chance. On held-out text: when predictions are ready (LogitLens), which
layers are alike (CKA at the last tokens of names, beside two seeds of the MoE), what gates tell
apart; with memory off, when predictions are ready without it.

A run trains in runs/STUDY/SEED/ARM (goes on where it was interrupted), and leaves what was
measured of it in results/STUDY/, so that six runs may be six sittings. When all are there,
results/STUDY.json is written with its figure and runs/STUDY/report/. --smoke: minutes
become seconds, and the numbers mean nothing. The last line printed is the summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import two_source_summary
from rich.console import Console
from two_source_studies import HELD_OUT, STUDIES, Twins

from engram_lm import CanonicalMap, EngramLMForCausalLM, whole
from engram_lm.analysis import ablation
from engram_lm.analysis.analyze import PARTS, WITHOUT_MEMORY
from engram_lm.analysis.measure import measure
from engram_lm.errors import DataError
from engram_lm.evaluate.answers import Question, answers
from engram_lm.precision import PRECISIONS, choose
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.config import TrainConfig
from engram_lm.train.loop import Run
from engram_lm.train.provenance import commit, machine
from engram_lm.train.stream import Continuous
from engram_lm.train.turns import train

ARMS = ("Engram", "MoE")
MAX_ORDER = 3
SMOKE_TOKENS = 1_024
LR = 4e-3
"""Of both arms. At the demo's, 0.016, the MoE does not learn to read (docs/log.md)."""
STATES = 384
"""Hidden states of each layer that are kept for CKA: 6 batches of 64."""


def stream(study: Twins, tokens: int, seed: int) -> Continuous:
    """What a run of this seed reads."""
    return Continuous(study.ids(tokens, seed).astype(np.uint16), study.token_bytes())


@contextmanager
def experts_off(model: Any, layer: int) -> Iterator[None]:
    """The routed experts of one layer give zeros; its shared expert stays."""
    experts = model.model.layers[layer].mlp.experts

    def nothing(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output)

    with experts.register_forward_hook(nothing):
        yield


def switched(arm: str, model: Any) -> dict[str, AbstractContextManager[None]]:
    """How a model is asked: as it is, and without some part."""
    found: dict[str, AbstractContextManager[None]] = {arm: nullcontext()}
    if arm == "Engram":
        found["Engram, memory off"] = ablation.memory_off(model)
        for layer in model.config.memory_config.specification.layers:
            found[f"Engram, layer {layer} off"] = ablation.layer_off(model, layer)
        return found
    for layer, kind in enumerate(model.config.mlp_layer_types):
        if kind == "sparse":
            found[f"MoE, experts of layer {layer} off"] = experts_off(model, layer)
    return found


def asked(arm: str, model: Any, questions: list[Question]) -> dict[str, dict[str, float]]:
    """Switch -> kind of question -> share of right answers."""
    kinds = np.array([question.kind for question in questions])
    found = {}
    for name, switch in switched(arm, model).items():
        with switch:
            right = answers(model, questions, batch=100).right
        found[name] = {kind: float(right[kinds == kind].mean()) for kind in dict.fromkeys(kinds)}
    return found


def run(study: Twins, arm: str, training: Continuous, config: TrainConfig, out: Path) -> Run:
    """One arm of one seed, to its end. Arms of a seed read the same tokens in the same order."""
    canonical = CanonicalMap.from_tokenizer(study.tokenizer)
    made = study.arms()[arm]
    torch.manual_seed(config.seed)
    model = EngramLMForCausalLM(made)
    if made.memory is not None:
        model.set_canonical_map(canonical)
    trained = Run(
        model,
        study.tokenizer,
        config,
        out / str(config.seed) / arm.lower(),
        training=training,
        validation=stream(study, config.validation_tokens, HELD_OUT + 10 + config.seed),
    )
    train([trained], [f"{arm}, seed {config.seed}"])
    trained.close()
    return trained


def measured(study: Twins, trained: Run, arm: str, training: Continuous, out: Path) -> None:
    """Leaves ARM-SEED.json and ARM-SEED.safetensors in `out`."""
    number, seed = 40 if study.small else 1_000, trained.config.seed
    read = study.material(training.ids_T, number // 4)
    canonical = CanonicalMap.from_tokenizer(study.tokenizer)
    found = measure(
        trained.model,
        study.tokenizer,
        read,
        canonical.ids_V.numpy(),
        read.counts(canonical, MAX_ORDER),
        PARTS if arm == "Engram" else WITHOUT_MEMORY,
    )
    assert found.states_AID is not None
    found.states_AID = found.states_AID[:, :STATES]
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / f"{arm}-{seed}.safetensors")
    record = {
        "questions": number,
        "asked": asked(arm, trained.model, study.questions(number)),
        "training_seconds": trained.seconds,
        "precision": trained.precision.name,
        "tokens": trained.config.steps * trained.config.batch * trained.config.context,
        "commit": commit(),
        "machine": machine(),
        "measured": time.strftime("%Y-%m-%d"),
    }
    whole.write(out / f"{arm}-{seed}.json", json.dumps(record, indent=1, allow_nan=False) + "\n")


def done(path: Path, config: TrainConfig) -> bool:
    """Whether a run of these tokens was measured. DataError where one of others was."""
    if not path.exists():
        return False
    wanted = config.steps * config.batch * config.context
    found = json.loads(path.read_text())["tokens"]
    if found != wanted:
        raise DataError(f"{path}: a run of {found:,} tokens, not {wanted:,}; move it away")
    return True


def check_precision(results: Path, precision: str) -> None:
    """DataError where a run of the study was trained in another precision: arms and seeds of one
    comparison differ in nothing else. Runs that say nothing of it were in bf16."""
    for path in results.glob("*-*.json"):
        found = json.loads(path.read_text()).get("precision", "bf16")
        if found != precision:
            raise DataError(f"{path}: trained in {found}, this would be in {precision}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", choices=STUDIES, default="twins")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, into NAME-smoke")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    study = STUDIES[arguments.study](arguments.smoke)
    name = f"{study.name}-smoke" if arguments.smoke else study.name
    sizes: dict[str, Any] = {"batch": 16, "evaluate_every": 200, "checkpoint_every": 200, "lr": LR}
    if arguments.smoke:
        sizes = {"tokens": SMOKE_TOKENS, "batch": 4, "validation_tokens": 512}
    results, out, console = Path("results") / name, Path("runs") / name, Console(stderr=True)
    sizes["precision"] = choose(arguments.precision).name
    check_precision(results, sizes["precision"])
    for seed in arguments.seeds:
        config = TrainConfig(**{"tokens": arguments.tokens, **sizes, "seed": seed})
        left = [arm for arm in arguments.arms if not done(results / f"{arm}-{seed}.json", config)]
        for arm in arguments.arms:
            if arm not in left:
                console.print(f"{arm}, seed {seed}: measured before")
        if not left:
            continue
        training = stream(study, config.tokens, seed)
        for arm in left:
            trained = run(study, arm, training, config, out)
            measured(study, trained, arm, training, results)
    paths = [results / f"{arm}-{seed}.json" for arm in ARMS for seed in arguments.seeds]
    missing = [path.stem for path in paths if not path.exists()]
    if missing:
        console.print(f"not measured yet: {', '.join(missing)}")
        return
    read = study.material(np.zeros(0, dtype=np.int64), 0)
    command = f"python recipes/two_source.py --study {arguments.study}"
    flat = two_source_summary.summarise(
        results, out, read, MAX_ORDER, arguments.seeds, study.world.chance, command
    )
    print(json.dumps(flat))


if __name__ == "__main__":
    main()
