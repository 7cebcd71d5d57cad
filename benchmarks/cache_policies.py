r"""What share of requests for rows a cache answers, by policy, size and order of the n-gram.

    python recipes/debian_text.py --out runs/debian
    engram data runs/debian/*.jsonl --tokenizer TOKENIZER --out runs/debian/deepseek
    python benchmarks/cache_policies.py --shards runs/debian/deepseek \
        --book runs/debian/anarchism.jsonl

TOKENIZER is DeepSeek-V4.1's, and so are the addresses: orders 2 to 4, 8 heads each, of layer 1. A
released table has 16M rows a head for trillions of tokens of training text. Here are 22M tokens, so
the table is scaled to 1M rows a head: two layers are then the 12 GB table that other benchmarks
serve, and 4-grams share rows as they do in a released one. Two policies are replayed against 16M
rows a head too, with as many rows in the cache.

Texts, none of which is among those that frequencies are counted on: `mixed`, documents of the same
packages drawn at random; `book`, a package that is left out altogether, in its order; `wordnet`,
the prose that ships with the package, training documents as warm-up, then validation. Units:
`decode` asks for the rows of one token after the other; `prefill` for those of a document, at most
2048 tokens at once, repeats merged, and hits are counted among what is left. Caches are empty at
first, seeded ones apart. `cold`: what the first 10,000 tokens find; all other figures are taken
behind the warm-up. Writes results/cache_policies.json and .svg; the last line printed is its
summary.
"""

import engram_lm.openmp  # noqa: F401

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from policies import Hits, Rows, Trace, clock, in_sets, optimal, slru, tiny_lfu
from rich.console import Console
from rich.progress import Progress

from engram_lm import corpus
from engram_lm.analysis.figures import BLUE, GRID, INK, VERMILION, save
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses
from engram_lm.memory.ngrams_numba import CompiledAddresses
from engram_lm.memory.specification import Specification
from engram_lm.store.sets import PROBATION
from engram_lm.studies.record import Record
from engram_lm.train.shards import Shards

ORDERS, HEADS, LAYERS = (2, 3, 4), 8, (1, 14)
ROWS_PER_HEAD, RELEASED = 1_000_000, 16_000_000
Shares = tuple[float, ...]
SHARES: Shares = (0.003, 0.01, 0.03, 0.1, 0.25)
"""Cache sizes, of the rows of the table."""
FEW: Shares = (0.003, 0.03, 0.25)
WARM, MEASURED, COLD = 700_000, 300_000, 10_000
"""Tokens."""
PROMPT = 2048
CHUNK = 2**18
FIGURES = (*(f"order_{order}" for order in ORDERS), "all", "cold")
Ids = NDArray[np.int64]
Replay = Callable[[Trace, int], Hits]


class Text(NamedTuple):
    """Documents one behind another; what is measured begins at token `warm`."""

    ids_T: Ids
    starts_D: Ids
    warm: int


class Requests(NamedTuple):
    """A trace, and how many tokens come before each request."""

    trace: Trace
    tokens_Q: Ids

    def window(self, first: int, last: int) -> slice:
        """The entries that belong to these tokens, whole requests."""
        begins_Q = np.append(self.trace.begins_Q, len(self.trace.rows_M))
        low, high = np.searchsorted(self.tokens_Q, (first, last))
        return slice(int(begins_Q[low]), int(begins_Q[high]))


def text_of(documents: Iterable[Ids], warm: int | None = None) -> Text:
    """Whole documents. warm: tokens before what is measured; None: all but MEASURED."""
    kept = list(documents)
    ids_T = np.concatenate(kept)
    starts_D = np.cumsum([0, *map(len, kept[:-1])])
    return Text(ids_T, starts_D, len(ids_T) - MEASURED if warm is None else warm)


def until(documents: Iterable[Ids], tokens: int) -> Iterator[Ids]:
    """As many of them as it takes to have so many tokens."""
    for document in documents:
        if tokens <= 0:
            return
        yield document
        tokens -= len(document)


def texts(shards: Path, book: Path) -> tuple[Text, dict[str, Text]]:
    """What frequencies are counted on, and the texts that are replayed."""
    directory = Shards(shards, check=False)
    encoder, packed = directory.encoder, directory.split("train").shards[0]
    lines = book.read_text(encoding="utf-8").splitlines()
    encoded = encoder.encode([json.loads(line)["text"] for line in lines])
    books = [np.array([encoder.separator_id, *ids]) for ids in encoded]
    left_out = {document.astype(packed.ids_T.dtype).tobytes() for document in books}
    documents = np.split(packed.ids_T, packed.starts_D[1:])
    documents = [document for document in documents if document.tobytes() not in left_out]
    order_D = np.random.default_rng(0).permutation(len(documents))
    shuffled = [documents[index].astype(np.int64) for index in order_D]
    mixed = list(until(shuffled, WARM + MEASURED))
    before, validation = (
        [
            np.array([encoder.separator_id, *ids])
            for ids in encoder.encode(corpus.documents(split)[:number])
        ]
        for split, number in (("train", 40_000), ("validation", None))
    )
    before = list(until(before, WARM))
    return text_of(shuffled[len(mixed) :], 0), {
        "mixed": text_of(mixed),
        "book": text_of(until(books, WARM + MEASURED)),
        "wordnet": text_of([*before, *validation], sum(map(len, before))),
    }


def rows_of(addresses: Addresses, text: Text) -> Iterator[Rows]:
    """(T, H) rows of the first layer, some thousand tokens at a time."""
    starts_T = np.zeros(len(text.ids_T), np.bool_)
    starts_T[text.starts_D] = True
    back = addresses.specification.lookback
    for begin in range(0, len(text.ids_T), CHUNK):
        low, end = max(begin - back, 0), begin + CHUNK
        rows_LBTH = addresses.rows(
            torch.from_numpy(text.ids_T[None, low:end]),
            document_starts=torch.from_numpy(starts_T[None, low:end]),
        )
        yield rows_LBTH[0, 0, begin - low :].numpy().astype(np.int32)


def counts_of(addresses: Addresses, text: Text) -> NDArray[np.int64]:
    """(V,) how often the text asks for each row."""
    counts_V = np.zeros(addresses.specification.table_rows(LAYERS[0]), np.int64)
    for rows_TH in rows_of(addresses, text):
        counts_V += np.bincount(rows_TH.reshape(-1), minlength=len(counts_V))
    return counts_V


def decode(addresses: Addresses, text: Text) -> Requests:
    """Columns ascend, because heads follow one another in the table."""
    rows_TH = np.concatenate(list(rows_of(addresses, text)))
    begins_Q = np.arange(0, rows_TH.size, rows_TH.shape[1])
    return Requests(Trace(rows_TH.reshape(-1), begins_Q), np.arange(len(rows_TH)))


def prefill(addresses: Addresses, text: Text) -> Requests:
    """A request for each document, or for each PROMPT tokens of one."""
    rows_TH = np.concatenate(list(rows_of(addresses, text)))
    ends = [*text.starts_D[1:], len(rows_TH)]
    begins = chain(*(range(a, b, PROMPT) for a, b in zip(text.starts_D, ends, strict=True)))
    cuts = np.array([*begins, len(rows_TH)])
    requests = [np.unique(rows_TH[a:b]) for a, b in pairwise(cuts)]
    begins_Q = np.cumsum([0, *map(len, requests[:-1])])
    return Requests(Trace(np.concatenate(requests), begins_Q), cuts[:-1])


def ratios(requests: Requests, hit_M: Hits, bounds: list[int], window: slice) -> list[float]:
    """Hit ratio of each order, then of all, in a part of the trace."""
    order_M = np.searchsorted(bounds, requests.trace.rows_M[window], side="right")
    asked = np.bincount(order_M, minlength=len(ORDERS))
    hits = np.bincount(order_M, hit_M[window], minlength=len(ORDERS))
    return [*(hits / asked).tolist(), float(hits.sum() / asked.sum())]


def policies(table_rows: int, four_grams: int, hot_K: Rows) -> dict[str, Replay]:
    """By name. four_grams: their first row. hot_K: rows that training text asks for most."""

    def pinned(trace: Trace, places: int) -> Hits:
        return in_sets(trace, places, seeds=hot_K[: places // 2], pinned=True)

    def seeded(trace: Trace, places: int) -> Hits:
        return in_sets(trace, places, probation=PROBATION, seeds=hot_K[:places])

    def second(trace: Trace, places: int, door: int = 0) -> Hits:
        return in_sets(trace, places, door=door, ghost=2 * places)

    return {
        "lru_16_ways": in_sets,
        "segmented_16_ways": segmented,
        "segmented_seeded": seeded,
        "pinned_half": pinned,
        "second_sighting": second,
        "optimal": lambda trace, places: optimal(trace, places, table_rows),
        # From here on replayed on one text alone.
        "lru": lambda trace, places: slru(trace, places, table_rows),
        "clock": lambda trace, places: clock(trace, places, table_rows),
        "segmented": lambda trace, places: slru(trace, places, table_rows, protected=0.75),
        "second_sighting_4grams": lambda trace, places: second(trace, places, four_grams),
        "no_4grams": lambda trace, places: in_sets(trace, places, door=four_grams),
        "tiny_lfu": lambda trace, places: tiny_lfu(trace, places, table_rows),
    }


def segmented(trace: Trace, places: int) -> Hits:
    """What store/cache.py does."""
    return in_sets(trace, places, probation=PROBATION)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shards", type=Path, required=True, help="of DeepSeek token ids")
    parser.add_argument("--book", type=Path, required=True, help="JSONL of a source of the shards")
    arguments = parser.parse_args()
    record, console = Record("cache_policies"), Console(stderr=True)
    counted, replayed = texts(arguments.shards, arguments.book)
    canonical = CanonicalMap.from_tokenizer(arguments.shards / "tokenizer.json")
    tables = {}
    for name, rows in (("", ROWS_PER_HEAD), ("released_", RELEASED)):
        specification = Specification(
            layers=LAYERS,
            rows_per_head=(rows,) * len(ORDERS),
            heads=HEADS,
            pad_id=2,
            boundary_rule="document",
        )
        tables[name] = CompiledAddresses(specification, canonical)
    counts_V, bounds = counts_of(tables[""], counted), bounds_of(tables[""])
    summary: dict[str, float] = {
        "counted_tokens": len(counted.ids_T),
        "table_rows": len(counts_V),
        "asked_for_rows": int((counts_V > 0).sum()),
    }
    for order, part in zip(ORDERS, np.split(counts_V, bounds), strict=True):
        summary[f"asked_for_share_order_{order}"] = float((part > 0).mean())
    hot_K = np.argsort(-counts_V, kind="stable")[: len(counts_V) // 4].astype(np.int32)
    known = policies(len(counts_V), bounds[-1], hot_K)
    few = dict(list(known.items())[: list(known).index("lru")])
    two: dict[str, Replay] = {"lru_16_ways": in_sets, "segmented_16_ways": segmented}
    jobs: list[tuple[str, str, Callable[[Addresses, Text], Requests], dict[str, Replay], Shares]]
    jobs = [
        ("", "mixed", decode, known, SHARES),
        ("", "mixed", prefill, few, FEW),
        ("", "book", decode, few, FEW),
        ("", "wordnet", decode, few, FEW),
        ("released_", "mixed", decode, two, FEW),
    ]
    raw: dict[str, dict[str, float]] = {}
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("replaying", total=sum(len(job[3]) * len(job[4]) for job in jobs))
        for table, text, unit, tried, shares in jobs:
            requests = unit(tables[table], replayed[text])
            measured = requests.window(replayed[text].warm, len(replayed[text].ids_T))
            cold, bounds = requests.window(0, COLD), bounds_of(tables[table])
            for share in shares:
                for name, replay in tried.items():
                    hit_M = replay(requests.trace, int(share * len(counts_V)))
                    found = ratios(requests, hit_M, bounds, measured)
                    found.append(ratios(requests, hit_M, bounds, cold)[-1])
                    key = f"{table}{text}_{unit.__name__}_{name}_{100 * share:g}"
                    raw[key] = dict(zip(FIGURES, found, strict=True))
                    summary |= {f"{key}_{what}": value for what, value in raw[key].items()}
                    bar.advance(task)
    record.write(summary, {"shares": SHARES, "probation": PROBATION}, seeds=[0])
    save(figure(raw), Path("results"), "cache_policies")
    print(json.dumps(summary))


def bounds_of(addresses: Addresses) -> list[int]:
    """Where the rows of the second and of each later order begin."""
    return list(addresses.specification.offsets(LAYERS[0])[HEADS::HEADS])


def figure(raw: Mapping[str, Mapping[str, float]]) -> Figure:
    """Hit ratio over size, a panel for each order and one for all."""
    drawn = (
        ("optimal", "best possible", INK, ":", ""),
        ("segmented_16_ways", "segmented LRU (default)", BLUE, "-", "o"),
        ("second_sighting", "second sighting", "#009E73", "-.", "^"),
        ("lru_16_ways", "LRU", VERMILION, "-", "D"),
        ("tiny_lfu", "TinyLFU", "#CC79A7", "--", "s"),
        ("no_4grams", "LRU without 4-grams", "#8a8a8a", "--", "v"),
    )
    shown = Figure(figsize=(9, 3.6), layout="constrained")
    panels = shown.subplots(1, 4, sharey=True)
    sizes = [100 * share for share in SHARES]
    for axes, what in zip(panels, FIGURES[:4], strict=True):
        for name, label, colour, line, marker in drawn:
            points = [raw[f"mixed_decode_{name}_{size:g}"][what] for size in sizes]
            axes.plot(
                sizes, points, line, color=colour, marker=marker, markersize=4, label=label, lw=1.4
            )
        axes.set_title("all orders" if what == "all" else what.replace("order_", "") + "-grams")
        axes.set(xscale="log", ylim=(0, 1), xlabel="cache, % of table")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("hit ratio")
    handles, labels = panels[0].get_legend_handles_labels()
    shown.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return shown


if __name__ == "__main__":
    main()
