"""Two models that may be compared: equal parameters, equal active parameters, so equal FLOPs.

`twin` moves a share of the sparse parameters between routed experts and tables. The memory's
projections are active parameters too, and at small widths not few, so the shared expert is made
narrower until the active parameters agree: nothing is given to the memory for free.
"""

import copy
from dataclasses import replace

from engram_lm.config import MemoryConfig, nano
from engram_lm.errors import ConfigError, instance, number
from engram_lm.model.budget import Ledger, ledger
from engram_lm.model.config import EngramLMConfig

TOLERANCE = 0.005


def twin(config: EngramLMConfig, rho: float, memory: MemoryConfig | None = None) -> EngramLMConfig:
    """The configuration of equal P_tot and P_act, to 0.5 %, whose experts are `rho` of P_sparse.

    rho 1 gives a MoE without memory, so `twin(twin(moe, 0.75), 1.0)` leads back. `memory` is the
    memory to use but for its rows, which are counted out here; default is the one that config has,
    or nano(). Raises ConfigError where no such model exists.
    """
    instance("memory", memory, MemoryConfig, type(None))
    if not 0 <= number("rho", rho) <= 1:
        raise ConfigError(f"rho={rho}: a share from 0 (all tables) to 1 (all experts)")
    goal = ledger(config)
    sparse_layers = (config.mlp_layer_types or []).count("sparse")
    expert = 3 * config.hidden_size * config.moe_intermediate_size * sparse_layers
    if not goal.p_sparse or not expert:
        raise ConfigError(
            "a model without routed experts or tables has nothing to move: P_sparse = 0"
        )
    other = copy.deepcopy(config)
    other.name_or_path = ""  # another model
    other.n_routed_experts = (config.num_experts_per_tok or 0) + round(rho * goal.p_sparse / expert)
    if other.n_routed_experts % (config.n_group or 1):
        raise ConfigError(
            f"rho={rho}: gives {other.n_routed_experts} experts, not a multiple of "
            f"n_group={config.n_group}"
        )
    if rho == 1:
        other.memory = None
    else:
        memory = memory or config.memory_config or nano()
        other.memory = memory.to_dict()
    _pay(other, goal)
    if rho < 1:
        assert memory is not None
        _fill(other, memory, goal)
    _check(goal, ledger(other))
    return other


def _pay(config: EngramLMConfig, goal: Ledger) -> None:
    """Sets the shared expert's width so that P_act is nearest to the goal's."""
    width = config.shared_intermediate_size
    per_unit = ledger(config)["shared expert"].total // width
    width -= round((ledger(config).p_act - goal.p_act) / per_unit)
    if width < 1:
        price = ledger(config)["Engram projections"].total
        raise ConfigError(
            f"shared_intermediate_size={config.shared_intermediate_size}: too narrow to pay for "
            f"the memory's projections, {price} active parameters"
        )
    config.shared_intermediate_size = width


def _fill(config: EngramLMConfig, memory: MemoryConfig, goal: Ledger) -> None:
    """Sets the rows per head so that P_tot is nearest to the goal's. Rows are primes: bisect."""

    def with_rows(rows: int) -> int:
        orders = len(memory.specification.rows_per_head)
        specification = replace(memory.specification, rows_per_head=(rows,) * orders)
        config.memory = replace(memory, specification=specification).to_dict()
        return ledger(config).p_tot

    low, high = 2, 4
    if with_rows(low) > goal.p_tot:
        raise ConfigError("the sparse parameters to move do not fill even 2 rows a head")
    while with_rows(high) < goal.p_tot:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if with_rows(middle) <= goal.p_tot else (low, middle)
    with_rows(min((low, high), key=lambda rows: abs(with_rows(rows) - goal.p_tot)))


def _check(goal: Ledger, found: Ledger) -> None:
    for name, wanted, got in (
        ("P_tot", goal.p_tot, found.p_tot),
        ("P_act", goal.p_act, found.p_act),
    ):
        if abs(got - wanted) > TOLERANCE * wanted:
            raise ConfigError(
                f"{name}={got}: differs by {got / wanted - 1:+.2%} from {wanted}; "
                "a twin differs by at most 0.5 %"
            )
