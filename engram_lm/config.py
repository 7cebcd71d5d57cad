"""What a memory is: the specification of its addresses, and the sizes and options around it.

Presets are functions. A variant is `dataclasses.replace(paper(), ...)`.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from engram_lm.errors import ConfigError, MismatchError, instance, number, shown, whole_number
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.specification import Specification

GATES = ("plain", "signed_sqrt", "signed_sqrt_copysign")
FLOAT32_EPS = 1.1920928955078125e-07


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How vectors become a residual update. Raises ConfigError.

    gate `plain`: equation 4 of the paper; `signed_sqrt`: a signed square root around the logit, as
    in the public demo; `signed_sqrt_copysign`: the same as DeepSeek-V4.1 writes it.
    """

    gate: str = "signed_sqrt"
    bias: bool = False
    """Of key and value projections (the demo has them)."""
    conv_kernel: int | None = 4
    """None: no short convolution. Its dilation is the highest order."""
    norm_eps: float = FLOAT32_EPS
    conv_norm_eps: float = 1e-5
    zero_centered_norms: bool = False
    """Norm weights are stored minus 1, all zero at first (Qwen4-Exp)."""

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ConfigError(f"gate={shown(self.gate)}: accepted are {', '.join(GATES)}")
        kernel = self.conv_kernel
        if kernel is not None and whole_number("conv_kernel", kernel) < 2:
            raise ConfigError(f"conv_kernel={kernel}: 2 or more, or null for no convolution")
        for name in ("bias", "zero_centered_norms"):
            instance(name, getattr(self, name), bool)
        for name in ("norm_eps", "conv_norm_eps"):
            object.__setattr__(self, name, number(name, getattr(self, name), least=0))


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """A whole memory: where rows are, how wide they are, how they are fused."""

    specification: Specification
    head_dim: int
    """Values per row."""
    fusion: FusionConfig = FusionConfig()

    def __post_init__(self) -> None:
        instance("specification", self.specification, Specification)
        object.__setattr__(self, "head_dim", whole_number("head_dim", self.head_dim))
        if self.head_dim < 1:
            raise ConfigError(f"head_dim={self.head_dim}: a row holds at least 1 value")
        instance("fusion", self.fusion, FusionConfig)

    @property
    def memory_dim(self) -> int:
        """Width of all rows of one position in one layer: (N - 1) * heads * head_dim."""
        return self.specification.heads_per_layer * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the specification in its file format and with its hash."""
        return {
            "specification": self.specification.to_dict(),
            "specification_sha256": self.specification.digest,
            "head_dim": self.head_dim,
            "fusion": asdict(self.fusion),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "MemoryConfig":
        """What to_dict gave. ConfigError on unknown or missing keys, MismatchError on the hash."""
        names = {field.name for field in fields(cls)}
        _check_keys("memory", record, {*names, "specification_sha256"})
        fusion = record["fusion"]
        _check_keys("memory.fusion", fusion, {field.name for field in fields(FusionConfig)})
        specification = Specification.from_dict(record["specification"])
        if specification.digest != record["specification_sha256"]:
            raise MismatchError(
                f"memory.specification has sha256 {specification.digest}, recorded beside it is "
                f"{record['specification_sha256']}: one of them was edited"
            )
        return cls(
            specification=specification,
            head_dim=record["head_dim"],
            fusion=FusionConfig(**fusion),
        )


def _check_keys(where: str, record: Any, names: set[str]) -> None:
    if not isinstance(record, dict) or set(record) != names:
        given = sorted(record) if isinstance(record, dict) else record
        raise ConfigError(f"{where}: keys {', '.join(sorted(names))} are needed, these are {given}")


def paper() -> MemoryConfig:
    """Engram-27B of arXiv 2601.07372, appendix A: 2 x 16 heads of 2,262,400 rows x 80."""
    return MemoryConfig(
        specification=Specification(
            layers=(1, 14), rows_per_head=(2_262_400, 2_262_400), heads=8, pad_id=2
        ),
        head_dim=80,
        fusion=FusionConfig(gate="plain"),
    )


def demo() -> MemoryConfig:
    """The defaults of the authors' public demo (January 2026). Its layer 15 is not the paper's."""
    return MemoryConfig(
        specification=Specification(
            layers=(1, 15), rows_per_head=(646_400, 646_400), heads=8, pad_id=2
        ),
        head_dim=64,
        fusion=FusionConfig(bias=True),
    )


def deepseek_v41() -> MemoryConfig:
    """DeepSeek-V4.1-Flash as released: 2 x 24 heads of 16M rows x 256, no convolution."""
    return MemoryConfig(
        specification=Specification(
            layers=(1, 14),
            rows_per_head=(16_000_000, 16_000_000, 16_000_000),
            heads=8,
            pad_id=2,
            boundary_rule="document",
        ),
        head_dim=256,
        fusion=FusionConfig(gate="signed_sqrt_copysign", conv_kernel=None, norm_eps=1e-20),
    )


def qwen4_exp() -> MemoryConfig:
    """Qwen3.8-Flash-Next as released: one table of 16 heads of 20M rows x 160, raw token ids."""
    return MemoryConfig(
        specification=Specification(
            layers=(1,),
            rows_per_head=(20_000_000, 20_000_000),
            heads=8,
            seed=1234,
            pad_id=248_044,
            rows_multiple=128,
            canonical_rule="raw",
            multiplier_rule="splitmix64",
            boundary_rule="eos",
        ).bind(CanonicalMap.identity(248_320)),
        head_dim=160,
        fusion=FusionConfig(norm_eps=1e-6, conv_norm_eps=1e-6, zero_centered_norms=True),
    )


def nano() -> MemoryConfig:
    """The memory of `engram demo`: two layers, 16 heads of 8 values; its twin sets the rows."""
    return MemoryConfig(
        specification=Specification(layers=(1, 3), rows_per_head=(4_000, 4_000), heads=8, pad_id=1),
        head_dim=8,
    )
