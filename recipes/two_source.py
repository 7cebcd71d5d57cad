"""Facts that were trained and facts in the context: what is left of each when memory is off.

    python recipes/two_source.py

The demo's twins, a MoE and an Engram model of equal parameters and FLOPs, are trained from scratch
on the documents of engram_lm/evaluate/suites/two_source.py: half of them state facts that never
change, half state facts drawn anew and ask for them. Then each is asked for both, as it is and with
parts switched off: the Engram arm without its memory, and as a control the MoE without the routed
experts of one layer, each layer in turn. Retention is raw, as the paper has it, and above chance.

Trains into runs/two-source/SEED (goes on where it was interrupted) and writes
results/two_source.json with its figure. --smoke: minutes become seconds, and the numbers mean
nothing. The last line printed is the summary.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from two_source_figure import draw

from engram_lm import CanonicalMap, EngramLMForCausalLM, preset
from engram_lm.analysis import ablation
from engram_lm.analysis.ablation_losses import retention
from engram_lm.errors import DataError
from engram_lm.evaluate.answers import answers
from engram_lm.evaluate.suites.two_source import PAD, SEPARATOR, TwoSource
from engram_lm.model.presets import RHO, configure, for_vocabulary
from engram_lm.model.twin import twin
from engram_lm.studies.record import Record
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.config import TrainConfig
from engram_lm.train.loop import Run
from engram_lm.train.stream import Continuous
from engram_lm.train.turns import train

ARMS = ("MoE", "Engram")


def tokenizer_of(world: TwoSource) -> PreTrainedTokenizerFast:
    """One token a word."""
    words = world.words()
    backend = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=words[PAD])
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=words[SEPARATOR],
        eos_token=words[SEPARATOR],
        pad_token=words[PAD],
    )


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


def run(seed: int, world: TwoSource, config: TrainConfig, out: Path, small: bool) -> dict[str, Any]:
    """Both arms of one seed, trained in turn on the same tokens in the same order."""
    tokenizer = tokenizer_of(world)
    canonical = CanonicalMap.from_tokenizer(tokenizer)
    if canonical.canonical_ids != world.vocabulary:
        raise DataError(f"{canonical.canonical_ids} canonical ids of {world.vocabulary} words")
    training = stream_of(world, config.tokens, seed)
    validation = stream_of(world, config.validation_tokens, seed + 1_000)
    runs = {}
    for arm, made in models_of(world, small).items():
        torch.manual_seed(seed)
        model = EngramLMForCausalLM(made)
        if made.memory is not None:
            model.set_canonical_map(canonical)
        runs[arm] = Run(
            model,
            tokenizer,
            config,
            out / str(seed) / arm.lower(),
            training=training,
            validation=validation,
        )
    train(list(runs.values()), list(runs))
    found: dict[str, Any] = {}
    for arm, each in runs.items():
        found |= asked(arm, each.model, world, 40 if small else 1_000)
        each.close()
    return found


def summarise(found: dict[int, dict[str, dict[str, float]]], chance: float) -> dict[str, float]:
    """Flat: name -> number. Means and standard deviations over seeds."""
    values: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        values.setdefault(name.replace(", ", "_").replace(" ", "_").replace("/", "_"), []).append(
            value
        )

    for seed in found.values():
        for name, kinds in seed.items():
            whole = seed[name.split(", ")[0]]
            for kind, score in kinds.items():
                add(f"{name} {kind}", score)
                if ", " in name and whole[kind] > chance:
                    add(f"{name} {kind} retained", retention(score, whole[kind]))
                    add(f"{name} {kind} above chance", retention(score, whole[kind], chance))
    flat: dict[str, float] = {"seeds": len(found), "chance": chance}
    for name, by_seed in values.items():
        if len(by_seed) == len(found):  # a score at chance in one seed retains nothing there
            flat[f"{name}_mean"] = statistics.mean(by_seed)
            flat[f"{name}_sd"] = statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0
    return flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--entities", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, into two_source-smoke")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    name = "two_source-smoke" if arguments.smoke else "two_source"
    record, console = Record(name), Console(stderr=True)
    world = TwoSource(entities=30 if arguments.smoke else arguments.entities)
    sizes = {"tokens": 1_024, "batch": 4, "validation_tokens": 512} if arguments.smoke else {}
    found = {}
    for seed in arguments.seeds:
        config = TrainConfig(**{"tokens": arguments.tokens, **sizes, "seed": seed})
        found[seed] = run(seed, world, config, Path("runs") / name, arguments.smoke)
        show(found[seed], console)
    flat = {**summarise(found, world.chance), "tokens": config.tokens, "entities": world.entities}
    record.write(flat, {str(seed): each for seed, each in found.items()}, seeds=arguments.seeds)
    draw(flat, record.path)
    print(json.dumps(flat))


def show(found: dict[str, dict[str, float]], console: Console) -> None:
    """One seed's shares of right answers."""
    kinds = list(next(iter(found.values())))
    table = Table(Column("", no_wrap=True), *kinds, box=None)
    for name, scores in found.items():
        table.add_row(name, *(f"{scores[kind]:.3f}" for kind in kinds))
    console.print(table)


if __name__ == "__main__":
    main()
