"""Facts that were trained and facts in the context: what is left of each when memory is off.

    python recipes/two_source.py
    python recipes/two_source.py --seeds 1 --arms MoE    # one run; another sitting does another

The demo's twins, a MoE and an Engram model of equal parameters and FLOPs, are trained from scratch
on the documents of engram_lm/evaluate/suites/two_source.py: half of them state facts that never
change, half state facts drawn anew and ask for them. Then each is asked for both, as it is and with
parts switched off: the Engram arm without its memory and each of its parts, and as a control the
MoE without the routed experts of one layer, each layer in turn. Retention is raw, as the paper has
it, and above chance. On held-out documents: when predictions are ready (LogitLens), which layers
are alike (CKA at the last tokens of names, beside two seeds of the MoE), what gates tell apart.

A run trains in runs/two_source/SEED/ARM (goes on where it was interrupted), and leaves what was
measured of it in results/two_source/, so that six runs may be six sittings. When all are there,
results/two_source.json is written with its figure and runs/two_source/report/. --smoke: minutes
become seconds, and the numbers mean nothing. The last line printed is the summary.
"""

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

from engram_lm import CanonicalMap, EngramLMForCausalLM, preset
from engram_lm.analysis import ablation
from engram_lm.analysis.analyze import OF_ALL, PARTS
from engram_lm.analysis.material import Material
from engram_lm.analysis.measure import measure
from engram_lm.errors import DataError
from engram_lm.evaluate.answers import answers
from engram_lm.evaluate.rendering import tokenizer_of
from engram_lm.evaluate.suites.two_source import PAD, SEPARATOR, TwoSource
from engram_lm.model.presets import RHO, configure, for_vocabulary
from engram_lm.model.twin import twin
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.config import TrainConfig
from engram_lm.train.loop import Run
from engram_lm.train.provenance import commit, machine
from engram_lm.train.stream import Continuous
from engram_lm.train.turns import train

ARMS = ("Engram", "MoE")
WORLD = {"entities": 1_000, "relations": 2, "values": 20}
SMOKE = {"entities": 30, "relations": 2, "values": 20}
STATES = 384
"""Hidden states of each layer that are kept for CKA: 6 batches of 64."""


def stream_of(world: TwoSource, tokens: int, seed: int) -> Continuous:
    """So many token ids of documents; a token counts as one byte of text."""
    ids: list[int] = []
    for document in world.documents(seed):
        ids += document
        if len(ids) > tokens:
            break
    return Continuous(
        np.array(ids[: tokens + 1], dtype=np.uint16), np.ones(world.vocabulary, dtype=np.int64)
    )


def models_of(world: TwoSource, small: bool) -> dict[str, Any]:
    """Configurations of the two arms, equal in parameters and FLOPs to 0.5 %."""
    moe = preset("nano-moe")
    if small:
        moe = configure(moe, {"num_hidden_layers": 4, "mlp_layer_types": None})
    vocabulary = {
        "token_ids": world.vocabulary,
        "separator_id": SEPARATOR,
        "padding_id": PAD,
    }
    return {
        "MoE": for_vocabulary(moe, **vocabulary),
        "Engram": for_vocabulary(twin(moe, RHO), **vocabulary),
    }


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


def asked(arm: str, model: Any, world: TwoSource, number: int) -> dict[str, dict[str, float]]:
    """Switch -> kind of question -> share of right answers."""
    questions = world.questions(number)
    kinds = np.array([question.kind for question in questions])
    found = {}
    for name, switch in switched(arm, model).items():
        with switch:
            right = answers(model, questions, batch=100).right
        found[name] = {kind: float(right[kinds == kind].mean()) for kind in dict.fromkeys(kinds)}
    return found


def run(
    arm: str, world: TwoSource, training: Continuous, config: TrainConfig, out: Path, small: bool
) -> Run:
    """One arm of one seed, to its end. Arms of a seed read the same tokens in the same order."""
    tokenizer = tokenizer_of(world)
    canonical = CanonicalMap.from_tokenizer(tokenizer)
    if canonical.canonical_ids != world.vocabulary:
        raise DataError(f"{canonical.canonical_ids} canonical ids of {world.vocabulary} words")
    made = models_of(world, small)[arm]
    torch.manual_seed(config.seed)
    model = EngramLMForCausalLM(made)
    if made.memory is not None:
        model.set_canonical_map(canonical)
    trained = Run(
        model,
        tokenizer,
        config,
        out / str(config.seed) / arm.lower(),
        training=training,
        validation=stream_of(world, config.validation_tokens, config.seed + 1_000),
    )
    train([trained], [f"{arm}, seed {config.seed}"])
    trained.close()
    return trained


def material(world: TwoSource, training: Continuous, tokens: int, questions: int) -> Material:
    """Held-out documents; as the corpus what was trained on."""
    ids_T = stream_of(world, tokens, 2_000).ids_T.astype(np.int64)
    words = world.words()
    documents = world.documents(seed=3_000)
    return Material(
        text="held-out documents",
        ids_T=ids_T,
        bytes_T=np.ones(len(ids_T), dtype=np.int64),
        names_T=np.array([words[token].startswith("last") for token in ids_T]),
        corpus="the training documents",
        corpus_C=training.ids_T.astype(np.int64),
        sentences=tuple(" ".join(words[token] for token in next(documents)[1:]) for _ in range(4)),
        suites=(world,),
        questions=questions,
    )


def measured(
    trained: Run, arm: str, world: TwoSource, training: Continuous, out: Path, small: bool
) -> None:
    """Leaves ARM-SEED.json and ARM-SEED.safetensors in `out`."""
    number, seed = 40 if small else 1_000, trained.config.seed
    read = material(world, training, 1_024 if small else 16_384, number // 4)
    canonical = CanonicalMap.from_tokenizer(trained.tokenizer)
    found = measure(
        trained.model,
        trained.tokenizer,
        read,
        read.counts(canonical, 3),
        PARTS if arm == "Engram" else OF_ALL,
        traced=seed == 0,
    )
    assert found.states_AID is not None
    found.states_AID = found.states_AID[:, :STATES]
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / f"{arm}-{seed}.safetensors")
    record = {
        "asked": asked(arm, trained.model, world, number),
        "training_seconds": trained.seconds,
        "tokens": trained.config.steps * trained.config.batch * trained.config.context,
        "commit": commit(),
        "machine": machine(),
        "measured": time.strftime("%Y-%m-%d"),
    }
    aside = out / f"{arm}-{seed}.partial"
    aside.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    aside.rename(out / f"{arm}-{seed}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, into two_source-smoke")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    name = "two_source-smoke" if arguments.smoke else "two_source"
    world = TwoSource(**(SMOKE if arguments.smoke else WORLD))
    sizes: dict[str, int] = {"batch": 16, "evaluate_every": 200, "checkpoint_every": 200}
    if arguments.smoke:
        sizes = {"tokens": 1_024, "batch": 4, "validation_tokens": 512}
    results, console = Path("results") / name, Console(stderr=True)
    for seed in arguments.seeds:
        config = TrainConfig(**{"tokens": arguments.tokens, **sizes, "seed": seed})
        training = stream_of(world, config.tokens, seed)
        for arm in arguments.arms:
            if (results / f"{arm}-{seed}.json").exists():
                console.print(f"{arm}, seed {seed}: measured before")
                continue
            trained = run(arm, world, training, config, Path("runs") / name, arguments.smoke)
            measured(trained, arm, world, training, results, arguments.smoke)
    complete = {
        seed
        for seed in arguments.seeds
        if all((results / f"{arm}-{seed}.json").exists() for arm in ARMS)
    }
    if complete != set(arguments.seeds):
        console.print(f"measured so far of both arms: seeds {sorted(complete)}")
        return
    training = stream_of(world, config.tokens, arguments.seeds[0])
    read = material(world, training, 1_024 if arguments.smoke else 16_384, 0)
    canonical = CanonicalMap.from_tokenizer(tokenizer_of(world))
    flat = two_source_summary.summarise(
        results, read, canonical, arguments.seeds, world, Path("runs") / name
    )
    print(json.dumps(flat))


if __name__ == "__main__":
    main()
