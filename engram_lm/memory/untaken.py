"""What happens to row gradients behind their back: nobody takes them, or all others are cleared.

They are outside of `.grad` (see table.py), so whatever handles gradients through parameters does
not reach them: torch's own optimisers step past them, a wrapper's zero_grad leaves them, clipping
and GradScaler scale the others alone. Each of these leaves a trace in the dense gradients of the
same memory or in an optimiser's step, and is said once a model.

Nothing here keeps a model or an optimiser alive, and nothing stands in a module's attributes, so
that models are copied and pickled as before.
"""

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from engram_lm.errors import UntrainedRowsWarning
from engram_lm.memory.fuse import Fuse

WITNESSES = 16
"""Dense parameters that are looked at where the memory has none of its own that is trained."""


class Trained(Protocol):
    """What is looked at of a table. Only `row_gradient` may speak to other workers."""

    weight: nn.Parameter
    row_gradient: Any

    @property
    def holds_gradient(self) -> bool:
        """Whether a row gradient is there."""
        ...

    @property
    def local_gradient(self) -> Any:
        """It, or None where it is not here yet."""
        ...


class _Mark(NamedTuple):
    """A dense gradient as a backward pass left it."""

    parameter: "weakref.ref[nn.Parameter]"
    norm: Tensor
    own: bool
    """Whether it belongs to the memory itself, and not to the model around it."""


@dataclass
class _Memory:
    """The tables that are read together, and what is known of the dense parameters beside them."""

    owner: "weakref.ref[nn.Module] | None" = None
    tables: "weakref.WeakSet[Any]" = field(default_factory=weakref.WeakSet)
    fuses: "list[weakref.ref[Fuse]]" = field(default_factory=list)
    marks: list[_Mark] = field(default_factory=list)
    """What the last backward pass left."""
    seen: "list[tuple[weakref.ref[nn.Parameter], weakref.ref[Tensor]]]" = field(
        default_factory=list
    )
    """Gradients that were there at the last forward pass."""
    in_backward: bool = False
    stepped: bool = False
    """An optimiser has had the dense gradients; what it left in them says nothing more."""
    changed: bool = False
    """The dense gradients were changed after the backward pass, and those of rows were not."""
    warned: set[str] = field(default_factory=set)

    def dense(self) -> Iterator[nn.Parameter]:
        """The memory's own with a gradient; where it has none, some of the model's."""
        fuses = [fuse for fuse in (each() for each in self.fuses) if fuse is not None]
        own = [p for f in fuses for p in f.parameters() if p.requires_grad and p.grad is not None]
        if own:
            return iter(own)
        owner = None if self.owner is None else self.owner()
        rest = () if owner is None else owner.parameters()
        return islice((p for p in rest if p.grad is not None), WITNESSES)

    def mark(self) -> None:
        grads = [(parameter, parameter.grad) for parameter in self.dense()]
        fuses = [fuse for fuse in (each() for each in self.fuses) if fuse is not None]
        own = {id(parameter) for fuse in fuses for parameter in fuse.parameters()}
        self.marks = [
            _Mark(weakref.ref(p), _norm(grad), id(p) in own)
            for p, grad in grads
            if grad is not None
        ]
        for table in self.tables:
            gradient = table.local_gradient
            values = None if gradient is None else weakref.ref(gradient.values_UE)
            _watch(table).values = values
        self.in_backward = False

    def norms(self) -> list[tuple[float, float]]:
        """Norms of each dense gradient, as the last backward pass left it and now."""
        grads = [(mark.norm, _grad(mark.parameter)) for mark in self.marks]
        both = [norm for old, grad in grads if grad is not None for norm in (old, _norm(grad))]
        if not both:
            return []
        flat = torch.stack([norm.double().to(both[0].device) for norm in both]).tolist()
        return list(zip(flat[::2], flat[1::2], strict=True))

    def cleared(self) -> bool:
        """Whether all that the last backward pass left is gone or zero; what was zero tells
        nothing."""
        norms = self.norms()
        left = [now for before, now in norms if before != 0]
        return not any(left) and (bool(left) or len(norms) < len(self.marks))

    def rescaled(self) -> bool:
        """Whether a dense gradient is another than the last backward pass left, and still there."""
        # By value: clipping without a limit, by which Trainer takes norms, changes none. A gradient
        # laid out anew has its norm to rounding.
        differs = [
            not (math.isnan(now) or math.isclose(now, before, rel_tol=1e-6))
            for before, now in self.norms()
            if before != 0
        ]
        # Around the memory, one of many gradients may be masked, as those of old tokens are.
        own = any(mark.own for mark in self.marks)
        return any(differs) if own else bool(differs) and all(differs)

    def has(self, parameters: set[int]) -> bool:
        """Whether one of the marked parameters is among them, by id."""
        return any(id(mark.parameter()) in parameters for mark in self.marks)


@dataclass
class _Watch:
    """One table."""

    memory: _Memory
    optimizers: "weakref.WeakSet[Optimizer]" = field(default_factory=weakref.WeakSet)
    """Row optimisers that were made of it."""
    taken: bool = False
    """A row optimiser has stepped with the gradient, and nothing was added since."""
    passed_by: str | None = None
    """The optimiser that has stepped the model and left the gradient."""
    values: "weakref.ref[Tensor] | None" = None
    """Values of the row gradient, as the last backward pass left it."""

    def rescaled(self, table: Trained) -> bool:
        """Whether somebody has written to the row gradient since, or put another in its place."""
        gradient = table.local_gradient
        if gradient is None:
            return False
        replaced = self.values is not None and self.values() is not gradient.values_UE
        return replaced or gradient.values_UE._version > 0


_WATCHES: "weakref.WeakKeyDictionary[Any, _Watch]" = weakref.WeakKeyDictionary()
_MEMORIES: "weakref.WeakKeyDictionary[nn.Module, _Memory]" = weakref.WeakKeyDictionary()


def owned(owner: nn.Module, tables: Iterable[Trained]) -> None:
    """Says whose tables these are: an optimiser that steps a parameter of `owner` should take their
    row gradients too."""
    memory = _MEMORIES.get(owner)
    if memory is None:
        memory = _MEMORIES[owner] = _Memory(weakref.ref(owner))
    for table in tables:
        if table not in memory.tables:
            memory.tables.add(table)
            _watch(table).memory = memory
            memory.fuses = [weakref.ref(each) for each in owner.modules() if isinstance(each, Fuse)]


def before_forward(table: Trained) -> None:
    """Before rows are asked for in a forward pass that will be trained: a gradient that is still
    there belongs to an accumulation, or is dropped, or was left behind."""
    watch = _watch(table)
    memory = watch.memory
    memory.in_backward = False
    if not table.holds_gradient:
        watch.taken, watch.passed_by = False, None
        return
    if memory.cleared():
        _drop(table, watch)
        return
    grads = [(weakref.ref(p), p.grad) for p in memory.dense()]
    memory.seen = [(each, weakref.ref(grad)) for each, grad in grads if grad is not None]
    if watch.passed_by is not None and not watch.taken:
        _say_left(table, watch, watch.passed_by)


def cleared(table: Trained) -> None:
    """Before a row gradient is cleared on purpose: says so where an optimiser has stepped the model
    and left it."""
    watch = _watch(table)
    if table.holds_gradient and watch.passed_by is not None and not watch.taken:
        _say_left(table, watch, watch.passed_by)
    watch.taken, watch.passed_by = False, None


def before_adding(table: Trained) -> None:
    """In a backward pass, before this table's gradient is added to what is there."""
    watch = _watch(table)
    memory = watch.memory
    if not memory.in_backward:
        held = [each for each in memory.tables if each.holds_gradient]
        memory.in_backward, memory.stepped, memory.changed = True, False, False
        renewed = bool(held) and _renewed(memory.seen)
        for each in held:
            # Where one cannot tell, what an optimiser has taken is not part of an accumulation.
            if renewed or (_distributed() and _watch(each).taken):
                _drop(each, _watch(each))
        memory.marks, memory.seen = [], []
        engine = torch.autograd.Variable._execution_engine
        # At the end of this pass, and there again: DDP writes its means at the end too.
        engine.queue_callback(lambda: engine.queue_callback(memory.mark))
    watch.taken, watch.passed_by = False, None


def trains(table: Trained, optimizer: Optimizer) -> None:
    """Says that an optimiser was made which takes this table's row gradients."""
    _watch(table).optimizers.add(optimizer)


def took(table: Trained) -> None:
    """Says that a row optimiser steps with the gradient that is there."""
    watch = _watch(table)
    changed(table)
    watch.taken, watch.passed_by = True, None


def changed(table: Trained) -> bool:
    """Whether clipping or a scaler has changed the dense gradients of this table's memory since the
    last backward pass, and not those of rows."""
    watch = _watch(table)
    memory = watch.memory
    if watch.rescaled(table):
        memory.changed = False
    elif not memory.stepped and not memory.changed:
        memory.changed = memory.rescaled()
    return memory.changed


def _watch(table: Trained) -> _Watch:
    watch = _WATCHES.get(table)
    if watch is None:
        if not _WATCHES:
            _install()
        watch = _WATCHES[table] = _Watch(_Memory())
        watch.memory.tables.add(table)
    return watch


_installed: list[Any] = []


def _install() -> None:
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before_step))
        _installed.append(register_optimizer_step_post_hook(_after_step))


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _waiting() -> list[tuple[Any, _Watch]]:
    """Tables that have a gradient."""
    tables = [reference() for reference in _WATCHES.keyrefs()]
    return [(each, _watch(each)) for each in tables if each is not None and each.holds_gradient]


def _steps(held: set[int], table: Trained, memory: _Memory) -> bool:
    """Whether an optimiser that has these parameters steps the table's model."""
    owner = None if memory.owner is None else memory.owner()
    parameters = () if owner is None else owner.parameters()
    return id(table.weight) in held or any(id(p) in held for p in parameters)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    waiting = _waiting()
    held = _held(optimizer) if waiting else set()
    for table, watch in waiting:
        if _steps(held, table, watch.memory):
            changed(table)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    waiting = _waiting()
    held = _held(optimizer) if waiting else set()
    for table, watch in waiting:
        memory = watch.memory
        if not _steps(held, table, memory):
            continue
        memory.stepped = memory.stepped or memory.has(held)
        if getattr(optimizer, "grad_scale", None) is not None and not watch.rescaled(table):
            memory.changed = True  # a scaler has left the division to this optimiser
        if watch.taken:
            if memory.changed:
                _say_changed(table, watch)
        elif id(table.weight) in held and not watch.optimizers:
            _say_left(table, watch, type(optimizer).__name__)
        else:  # a row optimiser may have its turn after this one
            watch.passed_by = type(optimizer).__name__


def _drop(table: Trained, watch: _Watch) -> None:
    taken, passed_by = watch.taken, watch.passed_by
    table.row_gradient = None
    watch.taken, watch.passed_by = False, None
    if passed_by is not None and not taken and not watch.optimizers:
        _say_left(table, watch, passed_by)
    elif not taken:
        _say(
            table,
            watch,
            "dropped",
            "row gradients of an earlier backward pass are dropped, because the dense gradients of "
            "this memory were cleared since; what clears them does not reach those of rows: call "
            "zero_grad of JointOptimizer or RowAdam, or of the model itself",
        )


def _say_left(table: Trained, watch: _Watch, optimizer: str) -> None:
    watch.memory.warned.add("dropped")
    _say(
        table,
        watch,
        f"left by {optimizer}",
        f"{optimizer} has stepped this model and left the gradients of its rows, which are not in "
        ".grad: rows keep their values. Train them with a JointOptimizer or RowAdam of this model "
        "as it is (EngramTrainer makes one), or freeze the table with requires_grad_(False)",
    )


def _say_changed(table: Trained, watch: _Watch) -> None:
    _say(
        table,
        watch,
        "changed",
        "the dense gradients of this memory were clipped or unscaled after the backward pass, and "
        "those of its rows, which are not in .grad, were taken as they were. JointOptimizer clips "
        "both; instead of a GradScaler use bfloat16",
    )


def _say(table: Trained, watch: _Watch, kind: str, text: str) -> None:
    memory = watch.memory
    if kind in memory.warned:
        return
    memory.warned.add(kind)
    owner = None if memory.owner is None else memory.owner()
    name = f"a table of {tuple(table.weight.shape)}"
    if owner is not None:
        names = [name for name, module in owner.named_modules() if module is table]
        name = f"{type(owner).__name__}, {''.join(names[:1])}"
    warnings.warn(f"{name}: {text}", UntrainedRowsWarning, stacklevel=3)


def _renewed(seen: "list[tuple[weakref.ref[nn.Parameter], weakref.ref[Tensor]]]") -> bool:
    """Whether every gradient of the last forward pass is gone, and new ones stand in their place or
    will: zero_grad came between forward and backward pass."""
    # A pass that can be differentiated adds out of place, and DDP moves gradients into its buckets.
    if torch.is_grad_enabled() or _distributed():
        return False
    before = [(grad(), _grad(parameter)) for parameter, grad in seen]
    return bool(before) and all(old is None or old is not new for old, new in before)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _grad(parameter: "weakref.ref[nn.Parameter]") -> Tensor | None:
    alive = parameter()
    return None if alive is None else alive.grad


def _norm(grad: Tensor) -> Tensor:
    """The norm of what this worker holds."""
    here: Tensor = grad.to_local() if hasattr(grad, "to_local") else grad
    if here.is_sparse:
        here = here.coalesce().values()
    return torch.linalg.vector_norm(here.detach())
