"""What a result was made with: machine, versions, commit, command."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

VERSIONS = ("transformers", "tokenizers", "numpy", "engram-lm")


CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
"""Those by which figures of two CPUs differ most."""


def machine() -> dict[str, str | int]:
    """Where this runs, and with which versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": processor(),
        "cpu_features": cpu_features(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, which its package's version may lack
        **{name: version(name) for name in VERSIONS},
    }


def processor() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> str:
    """Those of CPU_FEATURES that this processor has; the architecture's name where it is no x86."""
    found = torch.cpu.get_capabilities()
    names = [name for name in CPU_FEATURES if found.get(name)]
    return " ".join(names) or platform.machine()


def commit() -> str:
    """The commit of the working directory, marked if files differ from it; "unknown" where there is
    no repository, or no git.
    """
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def command() -> str:
    """The command line of this process, as a shell would take it."""
    return shlex.join(sys.orig_argv)
