"""`engram demo`: a MoE and its Engram twin, trained side by side on the WordNet corpus, and a
report.

Equal: P_tot and P_act (to 0.5 %, asserted by twin), tokens, their order, steps, optimisers,
learning rates, initial seed. Different: a quarter of the sparse parameters are table rows instead
of experts. The arms take turns, step by step, so that a machine that slows down slows both.
"""

import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from engram_lm import corpus
from engram_lm.analysis.compare import Arm, compare
from engram_lm.analysis.demo_report import write_demo_report
from engram_lm.analysis.material import Material, encoded
from engram_lm.analysis.results import DemoResults, TrainingLog
from engram_lm.errors import MismatchError
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.model.budget import ledger
from engram_lm.model.modeling import EngramLMForCausalLM
from engram_lm.model.presets import preset
from engram_lm.train.config import TrainConfig
from engram_lm.train.journal import read_metrics
from engram_lm.train.loop import Run
from engram_lm.train.provenance import machine
from engram_lm.train.stream import Continuous, Ids
from engram_lm.train.turns import train

ARMS = {"MoE": "nano-moe", "Engram": "nano-engram"}
REPORT_STEPS = 150
"""Training steps that take as long as analysis and report, whatever the machine; about."""


def demo(config: TrainConfig, out: Path, console: Console, command: str) -> DemoResults:
    """Trains what is not trained yet, analyses, and writes report.html and report.json into `out`.

    Run again, it takes up where it was interrupted; finished arms are not trained again.
    """
    tokenizer = corpus.tokenizer()
    with console.status("tokenising the WordNet corpus"):
        training = corpus.tokens("train", config.tokens + 1, seed=0)
        validation = corpus.tokens("validation", seed=0)
    runs = make_runs(config, out, training.ids, validation.ids)
    moe, engram = (run.precision for run in runs.values())
    if moe.name != engram.name:
        for run in runs.values():
            run.close()
        raise MismatchError(
            f"{out}: one arm began in {moe.name}, the other in {engram.name}, on two kinds of "
            f"machine; delete the directory, or set train.precision"
        )
    console.print(f"precision {moe}, {torch.get_num_threads()} threads", soft_wrap=True)
    train(list(runs.values()), list(runs), report_steps=REPORT_STEPS)
    arms = {
        name: Arm(name=name, model=run.model, log=training_log(run)) for name, run in runs.items()
    }
    for run in runs.values():
        run.close()
    with console.status("analysing") as status:
        results = compare(
            arms["MoE"],
            arms["Engram"],
            tokenizer,
            material(tokenizer, training.ids, config.context),
            seed=config.seed,
            command=command,
            settings=settings(config, runs),
            machine={**machine(), "system": platform.platform()},
            autocast=moe.autocast,
            progress=lambda what, done, of: status.update(f"{what}: {done:,} of {of:,}"),
        )
        write_demo_report(out, results)
    return results


def make_runs(config: TrainConfig, out: Path, training: Ids, validation: Ids) -> dict[str, Run]:
    """A run of each arm in `out`, ready to take turns: the same settings, tokens and seed."""
    tokenizer = corpus.tokenizer()
    canonical = CanonicalMap.from_tokenizer(tokenizer)
    token_bytes = corpus.token_bytes()
    return {
        name: Run(
            make_model(preset_name, canonical, config.seed),
            tokenizer,
            config,
            out / preset_name,
            training=Continuous(training, token_bytes),
            validation=Continuous(validation, token_bytes),
        )
        for name, preset_name in ARMS.items()
    }


def material(tokenizer: Any, training_ids: npt.NDArray[np.integer], context: int) -> Material:
    """The validation text whole, and as its corpus what was trained on."""
    texts = corpus.documents("validation")
    order = np.random.default_rng(0).permutation(len(texts))
    return Material(
        text="WordNet's validation documents",
        **encoded(((texts[place], True) for place in order), tokenizer),
        corpus=f"the {len(training_ids):,} training tokens",
        corpus_C=training_ids.astype(np.int64),
        context=context,
    )


def make_model(preset_name: str, canonical: CanonicalMap, seed: int) -> EngramLMForCausalLM:
    """A fresh model of a preset, its weights drawn from `seed`, ready to be addressed."""
    torch.manual_seed(seed)
    model = EngramLMForCausalLM(preset(preset_name))
    if model.config.memory is not None:
        model.set_canonical_map(canonical)
    return model


def training_log(run: Run) -> TrainingLog:
    """What the report needs of a run's metrics.jsonl. Speed is the median step's."""
    lines = read_metrics(run.out)
    return TrainingLog(
        ledger=ledger(run.model.config, run.config.context).to_dict(),  # type: ignore[arg-type]
        curve=[
            {"step": line["step"], "tokens": line["tokens"], "loss": line["loss"]} for line in lines
        ],
        validation=[
            {
                "step": line["step"],
                "tokens": line["tokens"],
                "loss": line["validation_loss"],
                "bpb": line["validation_bpb"],
            }
            for line in lines
            if "validation_loss" in line
        ],
        tokens_per_second=statistics.median(line["tokens_per_second"] for line in lines),
        seconds=run.seconds,
    )


def settings(config: TrainConfig, runs: dict[str, Run]) -> dict[str, Any]:
    """What was trained and how, label -> value, for a reader."""
    moe, engram = (run.model.config for run in runs.values())
    memory = engram.memory_config
    assert memory is not None
    specification = memory.specification
    assert specification.vocabulary is not None
    return {
        "Text": "WordNet 3.0 as prose; validation entries share no gloss with training",
        "Tokenizer": (
            f"byte-level BPE, {moe.vocab_size:,} ids, "
            f"{specification.vocabulary.canonical_ids:,} canonical"
        ),
        "Tokens trained on, each arm": f"{config.steps * config.batch * config.context:,}",
        "Steps": f"{config.steps} of {config.batch} sequences x {config.context} tokens",
        "Backbone": (
            f"{moe.num_hidden_layers} layers, width {moe.hidden_size}, {moe.streams} stream, "
            f"MLA with {moe.num_attention_heads} heads"
        ),
        "Experts, MoE": _experts(moe),
        "Experts, Engram": _experts(engram),
        "Memory": (
            f"layers {', '.join(map(str, specification.layers))} (from zero), orders 2 to "
            f"{specification.max_order}, {specification.heads} heads per order, about "
            f"{specification.rows_per_head[0]:,} rows x {memory.head_dim} values a head"
        ),
        "Optimiser": (
            f"Muon for matrices, Adam for the rest, learning rate {config.lr:g}; tables "
            f"row Adam at "
            f"{config.table_lr_multiplier:g} times that; weight decay {config.weight_decay:g} "
            "(matrices only)"
        ),
        "Precision": str(runs["Engram"].precision),
    }


def _experts(config: Any) -> str:
    return (
        f"{config.n_routed_experts} of width {config.moe_intermediate_size}, top "
        f"{config.num_experts_per_tok}, and a shared one of width {config.shared_intermediate_size}"
    )


def summary(results: DemoResults) -> dict[str, Any]:
    """The report's numbers on one line: the last line that `engram demo` prints."""
    moe, engram, bands = results.moe, results.engram, results.bands
    before, after, without = results.losses.values()
    return {
        "command": "demo",
        "precision": results.settings["Precision"],
        "seed": results.seed,
        "moe_loss": before.loss,
        "moe_bpb": before.bpb,
        "engram_loss": after.loss,
        "engram_bpb": after.bpb,
        "engram_memory_off_loss": without.loss,
        "engram_memory_off_bpb": without.bpb,
        "difference_loss": bands.difference_mean,
        "difference_error": bands.difference_error,
        "moe_tokens_per_second": moe.log.tokens_per_second,
        "engram_tokens_per_second": engram.log.tokens_per_second,
        "moe_ledger": moe.log.ledger,
        "engram_ledger": engram.log.ledger,
        "difference_by_band": bands.difference_bands,
        "validation_tokens": results.analysis.tokens,
    }
