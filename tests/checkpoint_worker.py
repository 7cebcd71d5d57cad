"""One of four processes that save and load as 1, 2 and 4 workers; started by test_checkpoint.py.

    checkpoint_worker.py OUT RANK

OUT/from4 and the like are runs of 4, 2 and 1 workers, from4.pt all that their checkpoint holds, and
RANK.json what this process saw. An assertion that fails ends all.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from test_checkpoint import IDENTITY, whole
from tiny import canonical_map, phrases, tiny_config, tiny_model
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from engram_lm.errors import EngramError
from engram_lm.memory.table import unallocated
from engram_lm.model import EngramLMForCausalLM
from engram_lm.train import blocks
from engram_lm.train.batches import Batch
from engram_lm.train.checkpoint import Checkpoints
from engram_lm.train.export import export, load_weights
from engram_lm.train.objective import Objective
from engram_lm.train.optimizers import Optimizers
from engram_lm.train.sharded_table import shard_tables
from engram_lm.train.state import State
from engram_lm.train.together import Together

SIZES = (4, 2, 1)
TOKENIZER = SimpleNamespace(save_pretrained=lambda directory: None)


class Trained:
    """A model, its optimisers and its checkpoints, as one of `size` workers has them."""

    def __init__(self, out: Path, backbone: bool = False) -> None:
        self.together = Together()
        self.model = tiny_model()
        shard_tables(self.model)
        self.objective = Objective(self.model)
        if backbone:
            tables = {table.weight for table in self.model.model.tables.values()}
            fully_shard(self.objective, ignored_params=tables)
        self.optimizers = Optimizers(self.model, lr=1e-3, table_lr_multiplier=5.0, weight_decay=0.1)
        self.state = State(self.model, self.optimizers)
        self.checkpoints = Checkpoints(out, self.together)
        torch.manual_seed(17 + self.together.rank)

    def step(self, number: int) -> tuple[float, float]:
        """The loss of all workers' sequences, and a random number of this worker's."""
        share = 4 // self.together.size
        ids = phrases(4, 17, seed=number)[self.together.rank * share :][:share]
        loss = self.objective(Batch(ids[:, :-1], ids[:, 1:], None))
        loss.backward()
        sums = [loss.detach()]
        sums += [p.grad for p in self.model.parameters() if p.grad is not None]
        for value in sums if self.together.size > 1 else ():
            dist.all_reduce(value)
            value /= self.together.size
        self.optimizers.step()
        self.optimizers.zero_grad()
        return loss.item() if self.together.size == 1 else sums[0].item(), torch.rand(()).item()

    def save(self, step: int) -> None:
        self.checkpoints.save(
            self.state.tensors(self.together.rank), {"identity": IDENTITY, "step": step}
        )

    def load(self) -> None:
        found = self.checkpoints.last(IDENTITY)
        assert found is not None
        self.state.load(found, self.checkpoints)

    def parts(self) -> dict[str, tuple[int, torch.Tensor]]:
        """All that this worker holds, random numbers left out."""
        return parts_of({k: v for k, v in self.state.tensors(0).items() if k[:6] != "random"})


def parts_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, torch.Tensor]]:
    """First row and values of each, by name; what fully_shard took apart is put together."""
    found = {}
    for name, tensor in tensors.items():
        first, part = getattr(tensor, "first_row", 0), getattr(tensor, "local", tensor)
        part = part.full_tensor() if isinstance(part, DTensor) else part
        found[name] = (first, part.detach().clone())
    return found


def check(parts: dict[str, tuple[int, torch.Tensor]], wanted: dict[str, torch.Tensor]) -> None:
    """Bit for bit, and nothing is missing."""
    assert parts.keys() == {name for name in wanted if not name.startswith("random")}
    for name, (first, part) in parts.items():
        saved = wanted[name]
        saved = saved[first : first + len(part)] if saved.dim() else saved
        assert torch.equal(saved, part) and saved.dtype == part.dtype, name


@contextmanager
def workers(out: Path, name: str, rank: int, size: int):
    """The first `size` processes as the workers of one run."""
    store = dist.FileStore(str(out / f"{name}.store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    yield
    dist.destroy_process_group()


def fill(trained: Trained) -> None:
    """Moments as if there had been steps."""
    for index, (_, optimizer, parameter) in enumerate(trained.state._trained()):
        torch.manual_seed(1000 + index)
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.randn_like(parameter.detach()),
        }


def save_as(out: Path, rank: int, size: int, seen: dict) -> dict:
    with workers(out, f"save{size}", rank, size):
        trained = Trained(out / f"from{size}")
        steps = [trained.step(number) for number in range(3)]
        trained.save(3)
        parts = {"from": trained.parts()}
        seen[f"from{size}"] = steps + [trained.step(number) for number in (3, 4)]
        if size > 1:
            cut = Trained(out / f"cut{size}", backbone=True)
            fill(cut)
            cut.save(3)
            parts["cut"] = cut.parts()
            assert any(isinstance(each, DTensor) for each in cut.state.tensors(0).values())
    if rank == 0:
        for name in parts:
            path = out / f"{name}{size}" / "checkpoints" / "step-00000003"
            torch.save(whole(path), out / f"{name}{size}.pt")
    return parts


def load_as(out: Path, rank: int, size: int, seen: dict) -> None:
    with workers(out, f"load{size}", rank, size):
        for source in SIZES:
            wanted = torch.load(out / f"from{source}.pt")
            trained = Trained(out / f"from{source}")
            trained.load()
            check(trained.parts(), wanted)
            if source == 4:
                export(trained.model, TOKENIZER, out / f"export{size}", trained.together)
                with torch.random.fork_rng():
                    start(out / f"export{size}", wanted)
            seen[f"{source}->{size}"] = [trained.step(number) for number in (3, 4)]
        for source in (4, 2):
            for backbone in (True, False)[size == 1 :]:
                trained = Trained(out / f"cut{source}", backbone)
                trained.load()
                check(trained.parts(), torch.load(out / f"cut{source}.pt"))


def start(directory: Path, wanted: dict[str, torch.Tensor]) -> None:
    """From an exported model, with tables that no worker ever had whole."""
    torch.manual_seed(5)
    with unallocated():
        model = EngramLMForCausalLM(tiny_config())
    model.set_canonical_map(canonical_map())
    shard_tables(model, seed=9)
    load_weights(model, directory, Together())
    weights = parts_of(State(model, SimpleNamespace(each={}))._weights())
    check(weights, {name: each for name, each in wanted.items() if name.startswith("model.")})


def faults(out: Path, rank: int, seen: dict) -> None:
    """Each on one worker; all are to say the same."""

    def said(doing) -> None:
        try:
            doing()
        except EngramError as error:
            lines.append(f"{type(error).__name__}: {error}")

    lines = seen["faults"] = []
    with workers(out, "faults", rank, 4):
        trained = Trained(out / "faults")
        trained.save(1)
        place = FileSystem.concat_path
        if rank == 1:  # a disk that is full

            def full(self, path, name):
                return Path("/dev/full") if name.endswith(".distcp") else place(self, path, name)

            FileSystem.concat_path = full
        said(lambda: trained.save(2))
        FileSystem.concat_path = place
        trained.load()
        write = Path.open
        if rank == 2:

            def no_space(self, mode="r", *arguments, **named):
                return write(Path("/dev/full") if "+" in mode else self, mode, *arguments, **named)

            Path.open = no_space
        said(lambda: export(trained.model, TOKENIZER, out / "model", trained.together))
        Path.open = write
        if rank == 0:  # a file that is short, though no size says so
            (path,) = (out / "faults" / "checkpoints").glob("step-????????")
            file, record = path / "__3_0.distcp", json.loads((path / "checkpoint.json").read_text())
            file.write_bytes(file.read_bytes()[:500])
            record["files"][file.name] = 500
            (path / "checkpoint.json").write_text(json.dumps(record))
        dist.barrier()
        said(trained.load)
        trained.save(3)
        (out / f"{rank}.json").write_text(json.dumps(seen))
        if rank == 3:  # dies while it writes
            blocks.Blocks.__get_tensor_shard__ = lambda *_: os._exit(0)
        said(lambda: trained.save(4))
        (out / f"{rank}.json").write_text(json.dumps(seen))
        os._exit(0)  # without the fourth there is no orderly end


def main(out: Path, rank: int) -> None:
    torch.set_num_threads(1)
    blocks.BYTES = 1000  # several blocks a worker
    seen: dict = {}
    saved = {size: save_as(out, rank, size, seen) for size in SIZES if rank < size}
    for size in SIZES:
        if rank < size:
            load_as(out, rank, size, seen)
    for size, parts in saved.items():
        for name, each in parts.items():
            check(each, torch.load(out / f"{name}{size}.pt"))
    (out / f"{rank}.json").write_text(json.dumps(seen))
    faults(out, rank, seen)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
