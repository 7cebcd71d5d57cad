"""The demo's Engram model on the Debian corpus, trained by several processes on one machine.

    apt-get update && python recipes/train_debian_text.py --workers 2 --tokens 20000000

Makes the corpus where it is not there yet (`recipes/debian_text.py`: its shards are those of
`engram data`), and hands the rest to the command that docs/training.md explains. Run again, it goes
on where it was interrupted. Each worker has an equal part of the machine's cores.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--corpus", type=Path, default=Path("runs/debian"))
    parser.add_argument("--out", type=Path, default=Path("runs/debian-engram"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    arguments = parser.parse_args()
    shards = arguments.corpus / "shards"
    if not (shards / "index.json").exists():
        made = [sys.executable, "recipes/debian_text.py", f"--out={arguments.corpus}"]
        subprocess.run(made, check=True)
    command = train_command(shards, arguments.out, arguments.workers, arguments.tokens)
    print(shlex.join(command), file=sys.stderr)
    os.execvp(command[0], command)  # signals reach torchrun itself


def train_command(shards: Path, out: Path, workers: int, tokens: int) -> list[str]:
    """torchrun's command line for one machine."""
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        f"--nproc-per-node={workers}",
        *("-m", "engram_lm", "train", "--preset=nano-engram"),
        *(f"--data={shards}", f"--out={out}", f"--threads={threads}", f"--tokens={tokens}"),
        *("--set=train.evaluate_every=200", "--set=train.checkpoint_every=200"),
    ]


if __name__ == "__main__":
    main()
