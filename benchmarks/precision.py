"""What each precision costs on this kind of CPU: matrix products, and the demo's training step.

    python benchmarks/precision.py

The Engram arm trains in bf16, in fp32, and in fp32 with Muon's products left in bf16, as torch's
own Muon has them; a step each in turn within one process. Products of 256 and 1,024 rows and
columns in float32, bfloat16 and float16. Ceiling: the fastest precision here. Writes
results/precision_KIND.json, KIND being the feature that decides: amx_bf16, avx512_bf16, or avx2
on x86 where there is neither (or torch is told to use neither, with ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2). The last line printed is its summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from engram_lm import corpus
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.precision import fast_feature
from engram_lm.studies.demo import ARMS, make_model
from engram_lm.studies.record import Record
from engram_lm.train.allocator import keep_freed_memory
from engram_lm.train.config import TrainConfig
from engram_lm.train.loop import Run
from engram_lm.train.muon import Muon
from engram_lm.train.text import wordnet_stream

WARM = 2
SIZES = (256, 1_024)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = {"bf16": "bf16", "fp32": "fp32", "fp32_muon_bf16": "fp32"}


def kind() -> str:
    """The feature by which this CPU's precision is chosen."""
    if platform.machine() != "x86_64":
        return platform.machine()
    return fast_feature(torch.bfloat16) or "avx2"


def products() -> dict[str, float]:
    """GFLOP/s of each dtype and size: the best of a third of a second."""
    found = {}
    for size in SIZES:
        for name, dtype in DTYPES.items():
            left, right = torch.randn(2, size, size).to(dtype)
            taken: list[float] = []
            started = time.perf_counter()
            while time.perf_counter() - started < 0.33 or len(taken) < 3:
                begun = time.perf_counter()
                left @ right
                taken.append(time.perf_counter() - begun)
            found[f"product_{size}_{name}_gflops"] = 2 * size**3 / min(taken) / 1e9
    return found


def steps(counted: int) -> dict[str, list[float]]:
    """Milliseconds of the counted steps of each case, taken in turn."""
    tokenizer = corpus.tokenizer()
    canonical = CanonicalMap.from_tokenizer(tokenizer)
    taken: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as directory:
        runs = {}
        for case, precision in CASES.items():
            config = TrainConfig(
                tokens=(WARM + counted + 1) * 4096,
                evaluate_every=10**6,
                checkpoint_every=10**6,
                precision=precision,
            )
            runs[case] = Run(
                make_model(ARMS["Engram"], canonical, 0),
                tokenizer,
                config,
                Path(directory) / case,
                training=wordnet_stream("train", config.tokens + 1),
                validation=wordnet_stream("validation", 1000),
            )
        for optimizer in runs["fp32_muon_bf16"].optimizers.each.values():
            if isinstance(optimizer, Muon):
                optimizer.param_groups[0]["dtype"] = torch.bfloat16
        for step in range(WARM + counted):
            for case, run in runs.items():
                begun = time.perf_counter()
                run.step()
                if step >= WARM:
                    taken[case].append(1e3 * (time.perf_counter() - begun))
        for run in runs.values():
            run.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each case")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    keep_freed_memory()
    record = Record(f"precision_{kind()}", precision="auto")
    summary = products()
    taken = steps(arguments.steps)
    for case, values in taken.items():
        summary[f"step_{case}_ms"] = statistics.median(values)
    for case in ("fp32", "fp32_muon_bf16"):
        pairs = [a / b for a, b in zip(taken[case], taken["bf16"], strict=True)]
        summary[f"step_{case}_over_bf16"] = statistics.median(pairs)
    capability = torch.backends.cpu.get_cpu_capability()
    record.write(summary, {"milliseconds": taken, "torch_uses": capability}, seeds=[0])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
