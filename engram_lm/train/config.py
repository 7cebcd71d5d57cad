"""How a model is trained. Plain values, checked; saved beside every result."""

from dataclasses import dataclass

from engram_lm.errors import ConfigError
from engram_lm.precision import PRECISIONS


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Raises ConfigError. Shares are of all steps."""

    tokens: int = 1_100_000
    """To train on, counted with repeats; cut down to whole steps."""
    batch: int = 32
    """Sequences per step."""
    micro_batches: int = 1
    """Parts in which a worker takes its sequences of a step, one after another: less memory."""
    context: int = 128
    """Tokens per sequence."""
    seed: int = 0
    """Of initial weights and of the order of the data."""
    lr: float = 1.6e-2
    table_lr_multiplier: float = 5.0
    table_optimizer: str = "adam"
    """Two moments per value; or rowwise: one per row."""
    table_dtype: str = "fp32"
    """Of the rows themselves; or bf16, rounded stochastically. Moments are fp32."""
    weight_decay: float = 0.1
    """Of Muon's matrices; embeddings, norms and tables have none."""
    warmup: float = 0.05
    """Share of linear warm-up."""
    decay_at: tuple[float, ...] = (0.8, 0.9)
    """Shares after which the learning rate falls to decay_factor of what it was."""
    decay_factor: float = 0.316
    clip: float = 1.0
    """Joint norm of all gradients, rows included."""
    balance_rate: float = 0.02
    """Of the routing bias, per step. The usual 0.001 is for many times as many steps."""
    frozen: tuple[str, ...] = ()
    """Parts that keep their values: tables, tables.LAYER, fusion or backbone."""
    precision: str = "auto"
    """Of matrix products: bf16 (autocast, and Muon's orthogonalisation), fp32, or auto: bf16 where
    the device multiplies it in hardware. A run that goes on keeps what it began with."""
    backbone: str = "ddp"
    """On several workers, whole on each; or fully_shard, a part on each, as tables always are."""
    attention: str = "eager"
    """Of transformers: eager or sdpa, whose backward is slow on a CPU at short contexts."""
    evaluate_every: int = 45
    """Steps between validations, and one at the end."""
    validation_tokens: int = 16_384
    """Used during training; the end uses all there are."""
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        counts = ("batch", "micro_batches", "context", "evaluate_every", "validation_tokens")
        for name in (*counts, "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 1")
        if self.batch < self.micro_batches:
            raise ConfigError(
                f"micro_batches={self.micro_batches}: at most batch={self.batch}, a sequence each"
            )
        for name in ("lr", "table_lr_multiplier", "clip", "decay_factor"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: above 0")
        if self.steps < 1:
            raise ConfigError(
                f"tokens={self.tokens}: one step takes batch * context = "
                f"{self.batch * self.context}"
            )
        if not 0 <= self.warmup < 1 or any(not 0 < share <= 1 for share in self.decay_at):
            raise ConfigError(
                f"warmup={self.warmup}, decay_at={self.decay_at}: shares of all steps"
            )
        choices = {
            "precision": PRECISIONS,
            "backbone": ("ddp", "fully_shard"),
            "attention": ("eager", "sdpa"),
            "table_optimizer": ("adam", "rowwise"),
            "table_dtype": ("fp32", "bf16"),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}: accepted are {' and '.join(accepted)}"
                )

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.context)

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied with in this step (zero-based)."""
        done = (step + 1) / self.steps
        rise = min(1.0, done / self.warmup) if self.warmup else 1.0
        return rise * self.decay_factor ** sum(done > share for share in self.decay_at)
