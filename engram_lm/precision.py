"""Which dtype matrix products are computed in: a half-width one where the hardware multiplies it
fast, float32 everywhere else.

A CPU without bfloat16 instructions still accepts bfloat16, and torch 2.13 then multiplies at 1 to 2
GFLOP/s a thread instead of 60. So the dtype is chosen by the device, and the choice is said.
"""

import platform
import time
from functools import cache
from typing import NamedTuple

import torch

from engram_lm.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRECISIONS = ("auto", *DTYPES)
CPU_FEATURES = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16"),
}
"""dtype -> CPU features, as torch names them, any one of which multiplies it in hardware."""


class Precision(NamedTuple):
    """A choice, and the reason for it as half a sentence: "this CPU has avx512_bf16"."""

    name: str
    """"bf16" or "fp32"."""
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the products themselves."""
        return DTYPES[self.name]

    @property
    def autocast(self) -> torch.dtype | None:
        """What torch.autocast takes; None where nothing is cast."""
        return None if self.name == "fp32" else self.dtype

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose(wanted: str, device: torch.device | str = "cpu") -> Precision:
    """The precision to train and measure in. wanted: "auto", "bf16" or "fp32".

    "auto" is bf16 on CUDA devices and CPUs that multiply it in hardware, else fp32. Raises
    ConfigError.
    """
    if wanted not in PRECISIONS:
        raise ConfigError(f"precision={wanted!r}: accepted are {', '.join(PRECISIONS)}")
    if wanted != "auto":
        return Precision(wanted, "as it was set")
    fast, reason = fast_products(torch.bfloat16, torch.device(device).type)
    return Precision("bf16" if fast else "fp32", reason)


def opening_dtype(stored: torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype to open a model's weights in for inference: `stored`, or float32 where the device
    multiplies the stored one slowly. Every bfloat16 and float16 value is a float32 value too.
    """
    if stored not in CPU_FEATURES:
        return stored
    return stored if fast_products(stored, torch.device(device).type)[0] else torch.float32


def fast_feature(dtype: torch.dtype) -> str | None:
    """The feature of this x86 CPU that multiplies a 16-bit dtype in hardware, as torch names it;
    None where it has none, or torch is told not to use it (ATEN_CPU_CAPABILITY)."""
    features = torch.cpu.get_capabilities()
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return next((name for name in CPU_FEATURES[dtype] if wide and features.get(name)), None)


@cache
def fast_products(dtype: torch.dtype, device_type: str) -> tuple[bool, str]:
    """Whether a device multiplies matrices of a 16-bit dtype at least as fast as float32 ones, and
    the reason, as `Precision` has it.

    On x86 CPUs `fast_feature` decides; on others one product of each dtype is timed, once in a
    process.
    """
    name = str(dtype).removeprefix("torch.")
    if device_type == "cuda":
        fast = dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
        return fast, f"{torch.cuda.get_device_name()}, {name} {'in' if fast else 'not in'} hardware"
    if device_type != "cpu":
        return False, f"{device_type}: not known to multiply {name} fast"
    if platform.machine().lower() in ("x86_64", "amd64"):
        feature = fast_feature(dtype)
        if feature is not None:
            return True, f"this CPU has {feature}"
        used = torch.backends.cpu.get_cpu_capability()
        return False, f"no {name} products in hardware: torch uses this CPU as {used}"
    ratio = _seconds(torch.float32) / _seconds(dtype)
    return ratio >= 1, f"{name} products take {1 / ratio:.2f}x the time of float32 here"


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of five products, of a size that a small model has."""
    left, right = torch.ones(2, 256, 256, dtype=dtype)
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - started)
    return min(taken)
