"""The command line: parse, call, print. A user's mistake is one line on stderr, exit status 2."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from engram_lm.errors import AddressError, ConfigError, DataError, EngramError

# Heavy imports stay inside the verbs, so that `engram --help` and mistakes answer at once.


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `engram`. Returns the exit status."""
    parsed = parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except EngramError as error:
        print(f"engram {parsed.verb}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print(f"engram {parsed.verb}: interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs; the docs and their tests read it too."""
    top = argparse.ArgumentParser(
        prog="engram", description="Conditional memory for language models."
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], None], help: str) -> Any:
        added = verbs.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="print JSON and nothing else")
        return added

    add = verb(
        "demo", run_demo, "Train a MoE and its Engram twin on WordNet; write a report."
    ).add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="directory (default: %(default)s)")
    add("--tokens", type=int, default=1_100_000, help="per arm (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and data order (default: %(default)s)")
    add("--threads", type=int, help="processor threads (default: all cores)")
    _set(add, "train.lr=0.002")

    add = verb("train", run_train, "Train one model on the WordNet corpus.").add_argument
    add("--preset", default="nano-engram", help="nano-moe or nano-engram (default: %(default)s)")
    add("--out", type=Path, required=True, help="directory; goes on if it holds a checkpoint")
    add("--tokens", type=int, default=1_100_000, help="to train on (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and data order (default: %(default)s)")
    add("--threads", type=int, help="processor threads (default: all cores)")
    add("--device", default="cpu", help="cpu, or cuda where there is one (default: %(default)s)")
    _set(add, "train.lr=0.002, model.hidden_size=256")

    add = verb("generate", run_generate, "Continue a text, streamed.").add_argument
    add(
        "--model",
        type=Path,
        default=Path("runs/demo/nano-engram/model"),
        help="directory (default: %(default)s)",
    )
    add("--prompt", required=True, help="text to continue; - reads it from standard input")
    add("--tokens", type=int, default=64, help="most new tokens (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    add("--memory", choices=("on", "off"), default="on", help="off: the backbone alone")

    add = verb("rows", run_rows, "Print the rows that a text or token ids read.").add_argument
    add("--spec", required=True, help="paper, demo, deepseek-v4.1, or a specification's FILE.json")
    add("--tokenizer", type=Path, required=True, help="tokenizer.json, or a directory with one")
    add("--text", help="text to tokenise, without special tokens")
    add("--ids", help="token ids instead, as 1,2,3")
    add("--history", default="", help="token ids before them, oldest first")
    add(
        "--masked", default="", help="positions of image tokens: they and what is older are blocked"
    )
    add("--document-starts", default="", help="positions of first tokens of documents")
    add(
        "--save",
        type=Path,
        help="also write the specification, bound to the tokenizer, to FILE.json",
    )

    add = verb("budget", run_budget, "Print where parameters and FLOPs are.").add_argument
    add("--preset", default="nano-engram", help="nano-moe or nano-engram (default: %(default)s)")
    add("--model", type=Path, help="directory of a saved model instead")
    add("--rho", type=float, help="also its twin with this share of experts")
    add("--context", type=int, default=256, help="tokens attended to (default: %(default)s)")
    _set(add, "model.hidden_size=256")
    return top


def _set(add: Callable[..., Any], example: str) -> None:
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"any other setting: {example}",
    )


def run_demo(arguments: argparse.Namespace) -> None:
    from engram_lm.studies.demo import demo, summary
    from engram_lm.train.allocator import keep_freed_memory
    from engram_lm.train.config import TrainConfig

    train = _settings(arguments.set, ("train",))["train"]
    _prepare(arguments.threads)
    keep_freed_memory()
    config = _train_config(TrainConfig(tokens=arguments.tokens, seed=arguments.seed), train)
    console = Console(stderr=arguments.json)
    console.print(
        f"engram demo: a MoE and its Engram twin, {config.steps} steps each of "
        f"{config.batch * config.context} tokens of WordNet, into {arguments.out}"
    )
    command = "engram " + shlex.join(sys.argv[1:])
    results = demo(config, arguments.out, console, command)
    grid = Grid("", "loss, nats per token", "bits per byte", "tokens/s")
    speeds = {arm.name: f"{arm.log.tokens_per_second:,.0f}" for arm in results.arms}
    for name, evaluation in results.evaluations.items():
        grid.add_row(name, f"{evaluation.loss:.4f}", f"{evaluation.bpb:.4f}", speeds.get(name, ""))
    console.print(grid)
    console.print(f"report: {(arguments.out / 'report.html').resolve()}", soft_wrap=True)
    print(json.dumps(summary(results)))


def run_train(arguments: argparse.Namespace) -> None:
    from engram_lm.memory.canonical import CanonicalMap
    from engram_lm.model.modeling import EngramLMForCausalLM
    from engram_lm.model.presets import configure, preset
    from engram_lm.train import corpus
    from engram_lm.train.allocator import keep_freed_memory
    from engram_lm.train.config import TrainConfig
    from engram_lm.train.loop import Run, read_metrics, train

    changes = _settings(arguments.set, ("train", "model"))
    torch = _prepare(arguments.threads)
    keep_freed_memory()
    config = _train_config(
        TrainConfig(tokens=arguments.tokens, seed=arguments.seed), changes["train"]
    )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': this machine has none; accepted here is cpu")
    if arguments.device not in ("cpu", "cuda"):
        raise ConfigError(f"device={arguments.device!r}: accepted are cpu and cuda")
    torch.manual_seed(config.seed)
    model = EngramLMForCausalLM(configure(preset(arguments.preset), changes["model"]))
    tokenizer = corpus.tokenizer()
    if model.config.memory is not None:
        model.set_canonical_map(CanonicalMap.from_tokenizer(tokenizer))
    model.to(arguments.device)
    run = Run(
        model,
        tokenizer,
        config,
        arguments.out,
        training_ids=corpus.tokens("train", config.tokens + 1, seed=0).ids,
        validation_ids=corpus.tokens("validation", seed=0).ids,
        token_bytes=corpus.token_bytes(),
    )
    if not arguments.json:
        print(
            f"engram train: {arguments.preset}, step {run.step_number} of {config.steps}, "
            f"into {arguments.out}"
        )
    train([run], [arguments.preset])
    run.close()
    last = read_metrics(arguments.out)[-1]
    print(json.dumps({"command": "train", "preset": arguments.preset, **last}))


def run_generate(arguments: argparse.Namespace) -> None:
    from contextlib import nullcontext

    from transformers import AutoTokenizer, TextStreamer

    from engram_lm.model.modeling import EngramLMForCausalLM

    torch = _prepare(None)
    if arguments.tokens < 1 or arguments.temperature < 0:
        raise ConfigError(
            f"tokens={arguments.tokens}, temperature={arguments.temperature}: "
            "at least 1, and 0 or more"
        )
    if not (arguments.model / "config.json").is_file():
        raise DataError(
            f"{arguments.model}: no config.json; `engram demo` or `engram train` makes a model"
        )
    model = EngramLMForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.memory == "off" and model.config.memory is None:
        raise ConfigError("memory='off': this model has none")
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    torch.manual_seed(arguments.seed)
    streamer = None if arguments.json else TextStreamer(tokenizer, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": 0}
    with model.model.without_memory() if arguments.memory == "off" else nullcontext():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=arguments.tokens,
            streamer=streamer,
            **(sampling if arguments.temperature > 0 else {"do_sample": False}),
        )
    new = out[0, len(ids) :].tolist()
    if arguments.json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        print(
            json.dumps(
                {"prompt": prompt, "text": text, "token_ids": new, "memory": arguments.memory}
            )
        )


def run_rows(arguments: argparse.Namespace) -> None:
    import torch

    from engram_lm.memory.canonical import CanonicalMap, backend_of
    from engram_lm.memory.ngrams import Addresses

    if (arguments.text is None) == (arguments.ids is None):
        raise ConfigError("give either --text or --ids")
    specification = _specification(arguments.spec)
    backend = backend_of(arguments.tokenizer)
    addresses = Addresses(specification, CanonicalMap.from_tokenizer(backend))
    if arguments.ids is not None:
        ids = _integers("--ids", arguments.ids)
    else:
        ids = backend.encode(arguments.text, add_special_tokens=False).ids
    history = _integers("--history", arguments.history)
    if any(token_id < 0 for token_id in history):
        raise AddressError(f"--history={arguments.history}: ids run from 0 up")
    rows = addresses.rows(
        torch.tensor([ids], dtype=torch.int64),
        torch.tensor([history], dtype=torch.int64),
        masked=_positions("--masked", arguments.masked, len(ids)),
        document_starts=_positions("--document-starts", arguments.document_starts, len(ids)),
    )
    bound = addresses.specification
    if arguments.save is not None:
        bound.save(arguments.save)
    layers: dict[str, dict[str, Any]] = {}
    for index, layer in enumerate(bound.layers):
        table_rows = rows[index, 0]
        head_rows = table_rows - torch.tensor(bound.offsets(layer))
        layers[str(layer)] = {"head_rows": head_rows.tolist(), "table_rows": table_rows.tolist()}
    canonical = addresses.canonical.ids_V[torch.tensor(ids, dtype=torch.int64)].tolist()
    record = {
        "spec": arguments.spec,
        "spec_hash": bound.digest,
        "token_ids": ids,
        "canonical_ids": canonical,
        "layers": layers,
        "specification": bound.to_dict(),
    }
    if arguments.json:
        print(json.dumps(record))
        return
    console = Console()
    console.print(f"{arguments.spec}: specification {bound.digest}", soft_wrap=True)
    for name, kinds in layers.items():
        grid = Grid(
            "position", "token id", "canonical id", "token", "table rows", title=f"layer {name}"
        )
        for position, row in enumerate(kinds["table_rows"]):
            token = backend.decode([ids[position]], skip_special_tokens=False)
            cells = (str(position), str(ids[position]), str(canonical[position]), repr(token))
            grid.add_row(*cells, " ".join(map(str, row)))
        console.print(grid)


def run_budget(arguments: argparse.Namespace) -> None:
    from engram_lm.model.budget import ledger
    from engram_lm.model.config import EngramLMConfig
    from engram_lm.model.presets import configure, preset
    from engram_lm.model.twin import twin

    if arguments.context < 1:
        raise ConfigError(f"context={arguments.context}: at least 1")
    if arguments.model is not None:
        if not (arguments.model / "config.json").is_file():
            raise DataError(f"{arguments.model}: no config.json")
        name, config = str(arguments.model), EngramLMConfig.from_pretrained(arguments.model)
    else:
        name, config = arguments.preset, preset(arguments.preset)
    config = configure(config, _settings(arguments.set, ("model",))["model"])
    ledgers = {name: ledger(config, arguments.context)}
    if arguments.rho is not None:
        ledgers[f"twin at rho {arguments.rho:g}"] = ledger(
            twin(config, arguments.rho), arguments.context
        )
    if arguments.json:
        first, *others = ({"name": key, **value.to_dict()} for key, value in ledgers.items())
        print(json.dumps({**first, "twin": others[0]} if others else first))
        return
    for key, value in ledgers.items():
        grid = Grid("component", "total", "active", "FLOPs per token", title=key)
        for line in value.components:
            grid.add_row(line.name, f"{line.total:,}", f"{line.active:,}", f"{line.flops:,}")
        grid.add_section()
        grid.add_row("P_tot, P_act", f"{value.p_tot:,}", f"{value.p_act:,}", f"{value.flops:,}")
        Console().print(grid)
        rho = "none" if value.rho is None else f"{value.rho:.1%}"
        print(
            f"rho {rho}, tables {value.tables:,}, optimiser {value.optimizer_bytes / 1e6:,.1f} MB"
        )


def _specification(name: str) -> Any:
    from engram_lm import config
    from engram_lm.memory.specification import Specification

    presets = {"paper": config.paper, "demo": config.demo, "deepseek-v4.1": config.deepseek_v41}
    if name in presets:
        return presets[name]().specification
    if not Path(name).is_file():
        raise ConfigError(f"spec={name!r}: accepted are {', '.join(presets)}, or a FILE.json")
    return Specification.load(name)


def _integers(option: str, text: str) -> list[int]:
    if not text.strip():
        return []
    values = []
    for position, part in enumerate(text.split(",")):
        try:
            values.append(int(part))
        except ValueError:
            raise AddressError(
                f"{option}: {part!r} at position {position} is not an integer"
            ) from None
        if not -(2**63) <= values[-1] < 2**63:
            raise AddressError(f"{option}: {part} at position {position} does not fit in 64 bits")
    return values


def _positions(option: str, text: str, tokens: int) -> Any:
    import torch

    mask = torch.zeros(1, tokens, dtype=torch.bool)
    for position in _integers(option, text):
        if not 0 <= position < tokens:
            raise AddressError(f"{option}: position {position}; there are {tokens} tokens, from 0")
        mask[0, position] = True
    return mask


def _settings(pairs: list[str], accepted: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """--set train.lr=1e-3 as {"train": {"lr": 0.001}}; values are JSON, or else text."""
    found: dict[str, dict[str, Any]] = {name: {} for name in accepted}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        group, dot, name = key.partition(".")
        if not equals or not dot or group not in accepted:
            forms = " or ".join(f"{name}.KEY=VALUE" for name in accepted)
            raise ConfigError(f"--set {pair}: {forms} is needed")
        try:
            found[group][name] = json.loads(text)
        except ValueError:
            found[group][name] = text
    return found


def _train_config(config: Any, changes: dict[str, Any]) -> Any:
    from dataclasses import fields

    names = {field.name: type(getattr(config, field.name)) for field in fields(config)}
    for name, value in changes.items():
        if name not in names:
            raise ConfigError(f"train.{name}: unknown; accepted are {', '.join(names)}")
        if isinstance(value, list):
            value = tuple(value)
        if names[name] is float and isinstance(value, int):
            value = float(value)
        if type(value) is not names[name]:
            raise ConfigError(f"train.{name}={value!r}: {names[name].__name__} is needed")
        changes[name] = value
    return replace(config, **changes)


def _prepare(threads: int | None) -> Any:
    import torch
    from transformers.utils import logging

    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads={threads}: at least 1")
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return torch
