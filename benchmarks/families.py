"""Which families of transformers can be given a memory, and what is refused of each.

    python benchmarks/families.py            # some minutes; writes results/families.json
    python benchmarks/families.py --page     # writes the table in docs/families.md from it

Every causal language model that AutoModelForCausalLM knows: a small copy of it (from the default
configuration, or one named here where that does not run) is given a memory with loud weights, and
every mode of the probe is computed with it. Where the bare family is right the memory must be, and
where it is wrong the memory must refuse by the mode's name; anything else is counted as a fault.
"""

import engram_lm.openmp

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

import engram_lm
from engram_lm import CanonicalMap, MemoryConfig, Specification
from engram_lm.errors import ConfigError
from engram_lm.model import probe
from engram_lm.model.small_copy import VOCABULARY, decoder_layers, kinds, small_copy
from engram_lm.studies.record import Record

FAMILIES: Any = MODEL_FOR_CAUSAL_LM_MAPPING
HYBRID = ["linear_attention", "full_attention"]
RUNS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "zamba": {"num_hidden_layers": 8, "use_associative_scan": False},
}
"""What the default configuration lacks or has as no released model has it."""
PAGE, BEGIN, END = Path("docs/families.md"), "<!-- families -->\n", "<!-- /families -->\n"
ATTACHED, REFUSED = "attached", "refused"


def loud(model: torch.nn.Module) -> None:
    """As after training: rows, keys, values, convolution and norms far from their start."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".engram." in name or ".tables." in name:
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=0.3)


def tried(config_class: Any) -> dict[str, Any]:
    """What is recorded of one family: `state`, and why, or what of the modes is refused."""
    family = FAMILIES[config_class]
    family = family[0] if isinstance(family, tuple) else family
    name = config_class.model_type
    try:
        config = config_class(**RUNS.get(name, {}))
        with torch.device("meta"):
            layers = decoder_layers(family(config).base_model)
        model = small_copy(family, config, kinds(layers))
    except ConfigError as error:
        return {"state": REFUSED, "why": str(error)}
    except Exception as error:  # a family's default configuration may be of no model at all
        line = (str(error).splitlines() or [""])[0]
        return {"state": "not tried", "why": f"{type(error).__name__}: {line[:120]}"}
    if model is None:
        return {"state": "not tried", "why": "no small copy of it runs"}
    started = time.perf_counter()
    bare = probe.measure(small_copy(family, config, kinds(layers)))
    seconds = time.perf_counter() - started
    count = model.config.num_hidden_layers
    specification = Specification(
        layers=tuple(sorted({0, count - 1})),
        rows_per_head=(50, 50),
        heads=2,
        pad_id=1,
        boundary_rule="document",
    )
    memory = MemoryConfig(specification=specification, head_dim=8)
    try:
        engram_lm.attach(model, CanonicalMap.identity(VOCABULARY), memory)
    except ConfigError as error:
        return {"state": REFUSED, "why": str(error)}
    loud(model)
    with_memory = probe.measure(model)
    faults = [mode for mode in with_memory if mode not in bare]
    faults += [mode for mode in bare if not _by_name(mode, with_memory.get(mode, ""))]
    return {
        "state": ATTACHED,
        "bare": bare,
        "with_memory": with_memory,
        "faults": faults,
        "probe_seconds": seconds,
    }


def _by_name(mode: str, problem: str) -> bool:
    """Whether a memory refused a mode that its family gets wrong, in words of ours or of the
    family's own code."""
    wrong = "standard deviations"
    return (
        bool(problem)
        and not problem.startswith("its logits are off")
        and (problem.startswith(("ConfigError: ", "RuntimeError: crop: ")) or wrong not in problem)
    )


def page(raw: dict[str, Any]) -> str:
    """The table of docs/families.md."""
    lines = ["| family | memory | refused with it, because the bare family gets it wrong |"]
    lines.append("|---|---|---|")
    for name, each in sorted(raw["families"].items()):
        if each["state"] == ATTACHED:
            modes = ", ".join(each["bare"]) if len(each["bare"]) < len(probe.MODES) else "all modes"
            lines.append(f"| {name} | yes | {modes or 'nothing'} |")
        else:
            why = each["why"].split("; ")[0].replace("|", "\\|")
            lines.append(
                f"| {name} | {'no' if each['state'] == REFUSED else 'not tried'} | {why} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only write the table of the page")
    parser.add_argument("--only", nargs="+", help="families by model_type; prints, writes nothing")
    arguments = parser.parse_args()
    if not arguments.page:
        warnings.filterwarnings("ignore")
        transformers.logging.set_verbosity_error()
        record, families = Record("families"), {}
        classes = {
            each.model_type: each for each in FAMILIES if each.__module__.startswith("transformers")
        }
        names = sorted(arguments.only or classes)
        for name in track(names, "families"):
            families[name] = tried(classes[name])
        states = [each["state"] for each in families.values()]
        summary = {
            "families": len(families),
            "attached": states.count(ATTACHED),
            "refused": states.count(REFUSED),
            "not_tried": states.count("not tried"),
            "right_in_every_mode": sum(each.get("bare") == {} for each in families.values()),
            "slowest_probe_seconds": max(
                each.get("probe_seconds", 0.0) for each in families.values()
            ),
            "faults": sum(len(each.get("faults", ())) for each in families.values()),
        }
        if arguments.only:
            print(json.dumps(families, indent=1))
        else:
            raw = {"transformers": transformers.__version__, "families": families}
            record.write(summary, raw, seeds=[0, 1])
        print(json.dumps(summary))
    if not arguments.only:
        raw = json.loads(Path("results/families.json").read_text())["raw"]
        text = PAGE.read_text()
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(head + BEGIN + page(raw) + END + tail)


if __name__ == "__main__":
    main()
