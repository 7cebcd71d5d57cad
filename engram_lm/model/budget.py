"""Where the parameters and the FLOPs of a configuration are, component by component.

P_tot: all trainable parameters but token embedding and LM head. P_act: those active for one token.
P_sparse = P_tot - P_act; rho: the share of P_sparse that is routed experts, 1 - rho is tables.
Section 3 of arXiv 2601.07372; its Tables 1 and 5 count the token embedding too, which is `total`
here. Nothing is allocated: all of it is arithmetic on the configuration.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from engram_lm.config import MemoryConfig
from engram_lm.errors import instance, whole_number
from engram_lm.model.config import EngramLMConfig

MUON, ADAM = 4, 8
"""Optimiser bytes per parameter: one float32 moment, or two."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One line of the ledger; active and flops are per token."""

    name: str
    total: int
    active: int
    flops: int
    """Of matrix products and attention, forward, 2 per multiply-add, as torch's FlopCounterMode
    counts them; norms, gates, activations and the short convolution's taps are elementwise and not
    in it."""
    moment_bytes: int
    counted: bool = True
    """False for token embedding and LM head, which P_tot leaves out."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """All components of a configuration at one context length."""

    components: tuple[Component, ...]
    context: int

    def __getitem__(self, name: str) -> Component:
        return next(component for component in self.components if component.name == name)

    @property
    def p_tot(self) -> int:
        return sum(component.total for component in self.components if component.counted)

    @property
    def p_act(self) -> int:
        return sum(component.active for component in self.components if component.counted)

    @property
    def p_sparse(self) -> int:
        return self.p_tot - self.p_act

    @property
    def total(self) -> int:
        """P_tot and the token embedding, once; the LM head is not counted, tied or not."""
        return self.p_tot + self["token embedding"].total

    @property
    def parameters(self) -> int:
        """Every parameter there is, tied ones once."""
        return sum(component.total for component in self.components)

    @property
    def tables(self) -> int:
        return self["table rows active"].total + self["table rows inactive"].total

    @property
    def rho(self) -> float | None:
        """None where nothing is sparse."""
        idle = self["routed experts inactive"].total
        return None if not self.p_sparse else idle / self.p_sparse

    @property
    def flops(self) -> int:
        """Per token, forward."""
        return sum(component.flops for component in self.components)

    @property
    def optimizer_bytes(self) -> int:
        """Moments in float32: Muon one per parameter, Adam (embedding, tables, vectors) two."""
        return sum(component.total * component.moment_bytes for component in self.components)

    def to_dict(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "active": self.p_act,
            "context": self.context,
            "components": [asdict(component) for component in self.components],
            "p_tot": self.p_tot,
            "p_act": self.p_act,
            "p_sparse": self.p_sparse,
            "tables": self.tables,
            "rho": self.rho,
            "parameters": self.parameters,
            "flops_per_token": self.flops,
            "optimizer_bytes": self.optimizer_bytes,
        }


def ledger(config: EngramLMConfig, context: int = 256) -> Ledger:
    """The ledger of a configuration; `context` tokens attended to set the FLOPs of attention."""
    instance("config", config, EngramLMConfig)
    context = whole_number("context", context, least=1)
    D, layers = config.hidden_size, config.num_hidden_layers
    sparse_layers = (config.mlp_layer_types or []).count("sparse")
    expert = 3 * D * config.moe_intermediate_size
    active, experts = config.num_experts_per_tok or 0, config.n_routed_experts
    return Ledger(
        components=(
            *_vocabulary(config),
            _attention(config, context),
            _matrix("dense FFN", (layers - sparse_layers) * 3 * D * config.intermediate_size),
            _matrix("shared expert", sparse_layers * 3 * D * config.shared_intermediate_size),
            _matrix("routed experts active", sparse_layers * active * expert),
            _idle("routed experts inactive", sparse_layers * (experts - active) * expert, MUON),
            _matrix("router", sparse_layers * experts * D, moments=ADAM),
            _streams(config),
            *memory_components(config.memory_config, config.hidden_size, config.streams),
            _vector("norms", layers * (2 * D + _latent_norms(config)) + D),
        ),
        context=context,
    )


def _matrix(name: str, parameters: int, *, flops: int = 0, moments: int = MUON) -> Component:
    """A matrix product with every token; `flops` are those beyond its 2 per parameter."""
    return Component(
        name=name,
        total=parameters,
        active=parameters,
        flops=2 * parameters + flops,
        moment_bytes=moments,
    )


def _vector(name: str, parameters: int) -> Component:
    return Component(name=name, total=parameters, active=parameters, flops=0, moment_bytes=ADAM)


def _idle(name: str, parameters: int, moments: int) -> Component:
    return Component(name=name, total=parameters, active=0, flops=0, moment_bytes=moments)


def _vocabulary(config: EngramLMConfig) -> tuple[Component, ...]:
    """A tied head has no parameters of its own: its work makes all of the embedding active."""
    weights, tied = config.vocab_size * config.hidden_size, config.tie_word_embeddings
    embedding = Component(
        name="token embedding",
        total=weights,
        active=weights if tied else config.hidden_size,
        flops=0,
        moment_bytes=ADAM,
        counted=False,
    )
    own = 0 if tied else weights
    head = replace(embedding, name="LM head", total=own, active=own, flops=2 * weights)
    return embedding, head


def _attention(config: EngramLMConfig, context: int) -> Component:
    D, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    value_dim = config.v_head_dim or 0
    queries = heads * config.qk_head_dim
    parameters = D * queries if rank is None else D * rank + rank * queries
    parameters += D * (config.kv_lora_rank + config.qk_rope_head_dim)
    parameters += config.kv_lora_rank * heads * (config.qk_nope_head_dim + value_dim)
    parameters += heads * value_dim * D
    scores = 2 * context * heads * (config.qk_head_dim + value_dim)
    layers = config.num_hidden_layers
    return _matrix("attention", layers * parameters, flops=layers * scores)


def _latent_norms(config: EngramLMConfig) -> int:
    return config.kv_lora_rank + (config.q_lora_rank or 0)


def _streams(config: EngramLMConfig) -> Component:
    """mHC: two mixers a layer and one at the head; each projects all streams, then mixes them."""
    S, D, layers = config.streams, config.hidden_size, config.num_hidden_layers
    if S == 1:
        return _matrix("mHC", 0)
    mixed = (2 + S) * S
    matrices = 2 * layers * mixed * S * D + S * S * D
    vectors = 2 * layers * (mixed + 3) + S + 1
    return Component(
        name="mHC",
        total=matrices + vectors,
        active=matrices + vectors,
        flops=2 * matrices + 2 * layers * 2 * S * S * D,
        moment_bytes=ADAM,
    )


def memory_components(
    memory: MemoryConfig | None, hidden_size: int, streams: int
) -> tuple[Component, ...]:
    """What a memory adds to a decoder of this width and so many streams; zeros where None."""
    S, D = streams, hidden_size
    layers, rows, read, projections, bias, conv, norms = 0, 0, 0, 0, 0, 0, 0
    if memory is not None:
        specification, fusion = memory.specification, memory.fusion
        layers = len(specification.layers)
        rows = sum(specification.table_rows(layer) for layer in specification.layers)
        rows *= memory.head_dim
        read = layers * memory.memory_dim
        projections = layers * (S + 1) * D * memory.memory_dim
        bias = layers * (S + 1) * D if fusion.bias else 0
        conv = layers * S * D * (fusion.conv_kernel or 0)
        norms = layers * S * D * (2 if fusion.conv_kernel is None else 3)
    return (
        Component(name="table rows active", total=read, active=read, flops=0, moment_bytes=ADAM),
        _idle("table rows inactive", rows - read, ADAM),
        _matrix("Engram projections", projections),
        _vector("Engram conv", conv),
        _vector("Engram norms and biases", norms + bias),
    )
