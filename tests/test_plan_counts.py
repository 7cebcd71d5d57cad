"""A plan's bytes and messages against those of four processes that train on real text."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from traffic_worker import CONTEXT, SEQUENCES, config, text

from engram_lm import corpus
from engram_lm.memory.canonical import CanonicalMap
from engram_lm.memory.ngrams import Addresses
from engram_lm.model.cluster import Cluster, Job
from engram_lm.model.plan import Plan, Sizes
from engram_lm.model.row_profile import MeasuredProfile, Profile, measure
from engram_lm.model.traffic import counted, exchanges, owned

WORKERS = 4
SHARE = SEQUENCES // WORKERS
KINDS = ("counts", "ids", "rows", "gradients")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("traffic")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = Path(__file__).with_name("traffic_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, f"--nproc-per-node={WORKERS}", str(script), str(out)],
        check=True,
        env=environment,
        capture_output=True,
    )
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(WORKERS)]


@pytest.fixture(scope="module")
def addresses() -> Addresses:
    canonical = CanonicalMap.from_tokenizer(corpus.tokenizer())
    return Addresses(config().memory_config.specification, canonical)


def plan(profile: Profile) -> Plan:
    return Plan(
        sizes=Sizes.of(config(), CONTEXT),
        profile=profile,
        cluster=Cluster(workers=WORKERS),
        job=Job(tokens=SEQUENCES * CONTEXT, context=CONTEXT, sequences=SHARE),
    )


def own_profile(addresses) -> MeasuredProfile:
    """Of the very tokens of the step: each worker's share is a batch."""
    batches = ((part, None) for part in text()[:, :-1].split(SHARE))
    return MeasuredProfile(addresses.specification, {SHARE * CONTEXT: measure(addresses, batches)})


def requests(addresses, *, merged: bool) -> list[np.ndarray]:
    """Of each layer, how many rows every worker asks every owner for, by the row numbers."""
    rows_LBTH = addresses.rows(text()[:, :-1])
    found = []
    for layer, rows_BTH in zip(addresses.layers, rows_LBTH, strict=True):
        chunk = owned(addresses.specification.table_rows(layer), WORKERS)[0][1]
        shares = [part.flatten() for part in rows_BTH.split(SHARE)]
        asked = [part.unique() if merged else part for part in shares]
        found.append(np.array([np.bincount(part // chunk, minlength=WORKERS) for part in asked]))
    return found


def test_bytes_planned_from_the_same_tokens_are_those_handed_to_the_collectives(reports, addresses):
    handed = Counter()
    for report in reports:
        for kind, size in report["handed"]:
            handed[kind] += size
    planned = Counter()
    for found in plan(own_profile(addresses)).exchanges().values():
        for exchange in found:
            planned[exchange.name] += exchange.bytes
    assert dict(planned) == dict(handed) and set(handed) == set(KINDS)


def test_messages_and_bytes_over_links_are_those_the_tables_counted(reports, addresses):
    planned = plan(own_profile(addresses)).exchanges()
    merged, unmerged = requests(addresses, merged=True), requests(addresses, merged=False)
    for index, layer in enumerate(addresses.layers):
        traffic = [report["traffic"][index] for report in reports]
        total = {name: sum(each[name] for each in traffic) for name in traffic[0]}
        _, ids, rows, gradients = exchanges(counted(merged[index]), WORKERS, 8 * 4, 8 * 4)
        assert total["id_bytes"] == ids.link_bytes
        assert total["row_bytes"] == rows.link_bytes
        assert total["gradient_bytes"] == gradients.link_bytes
        assert total["asked"] == counted(unmerged[index]).sent
        assert total["messages"] == sum(exchange.messages for exchange in planned[layer])


def test_the_share_that_crosses_links_is_expected_within_five_deviations(reports, addresses):
    # Whether a worker owns a row that it asks for is chance only in heads that a bound cuts: at
    # most one head for each of the three bounds, and a coin's deviation for each of its rows.
    profile = own_profile(addresses)
    rows = profile.distinct(SHARE * CONTEXT).max()
    error = 5 * np.sqrt(WORKERS * 3 * rows / 4)
    for index, found in enumerate(plan(profile).exchanges().values()):
        fetched = sum(report["traffic"][index]["fetched"] for report in reports)
        assert found[1].link_bytes / 8 == pytest.approx(fetched, abs=error)
        assert error < 0.02 * fetched


def test_other_text_of_the_corpus_predicts_the_bytes_within_its_own_spread(reports, addresses):
    # Twelve worker batches of other documents; their spread is that of the four that ran as well.
    others = corpus.tokens("train", 60_000, seed=1).ids[-12 * SHARE * CONTEXT :]
    parts = torch.from_numpy(others.astype(np.int64)).view(12, SHARE, CONTEXT)
    each = [measure(addresses, [(part, None)]) for part in parts]
    sums = [int(point.rows_LH.sum()) for point in each]
    profile = MeasuredProfile(
        addresses.specification,
        {SHARE * CONTEXT: measure(addresses, ((part, None) for part in parts))},
    )
    handed = sum(size for report in reports for kind, size in report["handed"] if kind == "ids")
    planned = sum(found[1].bytes for found in plan(profile).exchanges().values())
    error = 4 * np.std(sums, ddof=1) * np.sqrt(1 / 12 + 1 / WORKERS)
    assert planned / 8 == pytest.approx(handed / 8, abs=WORKERS * error)
    assert WORKERS * error < 0.15 * handed / 8
