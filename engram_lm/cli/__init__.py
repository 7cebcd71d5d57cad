"""The command line: parse, call, print. A user's mistake is one line on stderr, exit status 2.

One file a verb, each with HELP, `options` and `run`. Heavy imports stay inside `run`, so that
`engram --help` and mistakes answer at once.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import sys
from typing import Any

from engram_lm.cli import (
    analyze,
    budget,
    data,
    demo,
    evaluate,
    generate,
    info,
    inspect,
    pack,
    plan,
    plan_serve,
    rows,
    serve,
    size,
    train,
)
from engram_lm.errors import EngramError

VERBS: dict[str, Any] = {
    "data": data,
    "demo": demo,
    "train": train,
    "generate": generate,
    "eval": evaluate,
    "serve": serve,
    "rows": rows,
    "budget": budget,
    "size": size,
    "plan": plan,
    "plan serve": plan_serve,
    "pack": pack,
    "info": info,
    "analyze": analyze,
    "gates": analyze.gates,
    "lens": analyze.lens,
    "bands": analyze.bands,
    "addresses": analyze.addresses,
    "alignment": analyze.alignment,
    "ablation": analyze.ablation,
    "inspect": inspect,
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `engram`. Returns the exit status."""
    parsed = parser().parse_args(arguments)
    try:
        # Only a verb whose answer can be no returns a status: `info` where files are not whole.
        return VERBS[parsed.verb].run(parsed) or 0
    except EngramError as error:
        print(f"engram {parsed.verb}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 1
    except OSError as error:  # a directory that may not be written, a disk that is full
        if error.filename is None or error.strerror is None:
            raise
        print(f"engram {parsed.verb}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"engram {parsed.verb}: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Takes a verb of two words, as `plan serve`, for one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if " ".join(words[:2]) in VERBS:
            words[:2] = [" ".join(words[:2])]
        return super().parse_known_args(words, namespace)


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs; the docs and their tests read it too."""
    top = _Parser(prog="engram", description="Conditional memory for language models.")
    verbs = top.add_subparsers(
        dest="verb", required=True, metavar="VERB", parser_class=argparse.ArgumentParser
    )
    for name, verb in VERBS.items():
        added = verbs.add_parser(name, help=verb.HELP, description=verb.HELP)
        added.add_argument("--json", action="store_true", help="print JSON and nothing else")
        verb.options(added.add_argument)
    return top
