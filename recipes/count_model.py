"""What counting n-grams alone gives on the texts of the demo and of the retrofit.

    python recipes/count_model.py

Modified Kneser-Ney of orders 1 to 4 (recipes/kneser_ney.py), fitted in seconds, with the tokenizer,
the training tokens, the held-out tokens and the bytes of the models that it stands beside:

- WordNet: `engram demo`'s training tokens and its validation text, in its windows of 128. A row
  begins where a model's window does, so that it sees no more context than they. `across` lets
  n-grams run over the windows' ends, which favours it a little.
- Docstrings: the windows that every arm of recipes/retrofit.py has seen, seed by seed, known by the
  checksum of their order in results/retrofit.json, and the tokens that the arms are judged by.

Writes results/count_model.json: nats per token and bits per byte, the uniform distribution's beside
them. The last line printed is the summary.
"""

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import retrofit_text
from kneser_ney import Ids, KneserNey, fit
from retrofit_arms import Sizes

from engram_lm import corpus
from engram_lm.analysis.student import spread
from engram_lm.errors import DataError
from engram_lm.studies.record import Record
from engram_lm.train.batches import Batches
from engram_lm.train.config import TrainConfig
from engram_lm.train.stream import Continuous

ORDERS = (1, 2, 3, 4)
RETROFIT = Path("results/retrofit.json")


def windows(ids_T: Ids, context: int) -> list[Ids]:
    """Rows of `context` + 1 ids, each beginning with the id that the last one ended with, as models
    read them; what fills no whole window comes last, a row of its own."""
    whole = (len(ids_T) - 1) // context * context
    first = np.arange(0, whole, context)[:, None] + np.arange(context + 1)
    rest = ids_T[None, whole:]
    return [ids_T[first], *([rest] if rest.shape[1] > 1 else [])]


def judged(model: KneserNey, parts: list[Ids], token_bytes: npt.NDArray[np.int64]) -> Any:
    """Nats per token and bits per byte of all ids but the rows' first."""
    nats = -sum(float(model.log_probabilities(rows_NT).sum()) for rows_NT in parts)
    tokens = sum(rows_NT[:, 1:].size for rows_NT in parts)
    text_bytes = sum(int(token_bytes[rows_NT[:, 1:]].sum()) for rows_NT in parts)
    return {"nats": nats / tokens, "bpb": nats / math.log(2) / text_bytes, "tokens": tokens}


def orders(train_NT: Ids, parts: list[Ids]) -> dict[str, Any]:
    """Uniform and every order, on the same held-out rows; seconds: fitting and judging."""
    token_bytes = corpus.token_bytes()
    found = {"uniform": judged(KneserNey(len(token_bytes), []), parts, token_bytes)}
    for order in ORDERS:
        begun = time.perf_counter()
        model = fit(train_NT, order, vocabulary=len(token_bytes))
        fitted = time.perf_counter() - begun
        found[f"order_{order}"] = judged(model, parts, token_bytes) | {"fit_seconds": fitted}
    return found


def wordnet() -> dict[str, Any]:
    """As engram_lm/studies/demo.py trains and measures: whole windows of the validation text."""
    config = TrainConfig()
    train = corpus.tokens("train", config.tokens + 1, seed=0).ids
    read = windows(corpus.tokens("validation", seed=0).ids, config.context)[0]
    across = np.append(read[:, :-1], read[-1, -1])[None]
    rows_NT = windows(train, config.context)[0]
    return {
        "trained_tokens": rows_NT[:, 1:].size,
        "windows": orders(rows_NT, [read]),
        "across": orders(train[None], [across]),
    }


def docstrings() -> dict[str, Any]:
    """Seed by seed of recipes/retrofit.py. DataError where this interpreter's standard library is
    another text than that of its result."""
    record = json.loads(RETROFIT.read_text())["raw"]
    text = retrofit_text.read()
    if retrofit_text.sha256(text) != record["facts"]["text_sha256"]:
        raise DataError(
            f"{RETROFIT}: made with Python {record['facts']['python']}, whose docstrings are other "
            "ones; run this with that version"
        )
    sizes = Sizes()
    stream = Continuous(retrofit_text.encoded(text["train"]), corpus.token_bytes())
    test = retrofit_text.encoded(text["test"])[: sizes.judged]
    by_seed = {}
    for seed, run in record["runs"].items():
        batches = Batches(stream, batch=sizes.batch, context=sizes.context, seed=int(seed))
        seen, rows = hashlib.sha256(), []
        for step in range(sizes.tokens // (sizes.batch * sizes.context)):
            batch = batches[step]
            seen.update(batch.inputs_BT.numpy().tobytes() + batch.targets_BT.numpy().tobytes())
            rows.append(np.c_[batch.inputs_BT.numpy(), batch.targets_BT.numpy()[:, -1]])
        if seen.hexdigest() != run["arms"]["memory"]["order_sha256"]:
            raise DataError(f"seed {seed}: other windows than those of {RETROFIT}")
        by_seed[seed] = orders(np.concatenate(rows), windows(test, sizes.context))
    return by_seed


def summarise(text: dict[str, Any], by_seed: dict[str, Any]) -> dict[str, float]:
    """Flat: name -> number."""
    flat: dict[str, float] = {"wordnet_trained_tokens": text["trained_tokens"]}
    for where in ("windows", "across"):
        for name, each in text[where].items():
            for measure, value in each.items():
                flat[f"wordnet_{where}_{name}_{measure}"] = value
    flat["docstrings_seeds"] = len(by_seed)
    for name in next(iter(by_seed.values())):
        for measure in ("nats", "bpb"):
            values = [each[name][measure] for each in by_seed.values()]
            for what, value in spread(values).items():
                flat[f"docstrings_{name}_{measure}_{what}"] = value
    return flat


def main() -> None:
    record = Record("count_model")
    text, by_seed = wordnet(), docstrings()
    flat = summarise(text, by_seed)
    record.write(
        flat, {"wordnet": text, "docstrings": by_seed}, seeds=[int(seed) for seed in by_seed]
    )
    print(json.dumps(flat))


if __name__ == "__main__":
    main()
