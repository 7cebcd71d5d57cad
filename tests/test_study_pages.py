"""What README and docs say of the demo, of counting and of the retrofit is in their results."""

import re

import pytest
from study_results import (
    BANDS,
    ECOSYSTEM,
    LOG,
    README,
    ROOT,
    TwoSource,
    all_there,
    demos,
    of,
    page,
    record,
    text_gain,
)

from engram_lm.analysis.student import half_width, spread


def band_rows() -> list[str]:
    """Engram minus MoE in nats a token, by order and band: the larger pair, and the demo."""
    study, rows = TwoSource("two_source_text").bands, []
    for at, order in enumerate(study["orders"]):
        for place, row in enumerate(study["difference_bands"][at]):
            cells = [f"{row['mean']:+.3f} ± {half_width(row['standard_error'], 3):.3f}"]
            for demo in demos().values():
                seeds = [s["difference_by_band"][at][place]["mean"] for s in demo["raw"].values()]
                found = spread(seeds)
                cells.append(f"{found['mean']:+.3f} ± {found['t95']:.3f}")
            rows.append(
                f"| {order}-gram, {row['band']} | {row['tokens']:,} | {' | '.join(cells)} |"
            )
    return rows


def bands_said() -> list[str]:
    nats, bpb = text_gain()
    gains = [
        f"{-each['difference_bpb_mean']:.4f} ± {each['difference_bpb_t95']:.4f}"
        for each in (demo["summary"] for demo in demos().values())
    ]
    rows = {row.split(" |")[0]: row.split(" | ")[2] for row in band_rows()}
    return [
        f"gains {nats['mean']:.3f} ± {nats['t95']:.3f} nats a token on WordNet's validation text, "
        f"{bpb['mean']:.4f} ± {bpb['t95']:.4f} bits per byte; the demo's gains {gains[0]} (bf16) "
        f"and {gains[1]} (fp32)",
        f"never seen it loses {rows['| 2-gram, never'].lstrip('+')} nats, behind those seen one to "
        f"nine times {rows['| 2-gram, 1-9'].lstrip('+')}",
    ]


def counted() -> dict[str, float]:
    return record("count_model")["summary"]


def count_rows() -> list[str]:
    """Of docs/analysis.md: what counting has, beside both arms of the demo."""
    flat = counted()
    rows = [
        f"| {title} | {flat[f'wordnet_windows_{name}_nats']:.4f} "
        f"| {flat[f'wordnet_windows_{name}_bpb']:.4f} | {flat[f'wordnet_across_{name}_bpb']:.4f} |"
        for title, name in (
            ("uniform", "uniform"),
            ("1-grams", "order_1"),
            ("2-grams", "order_2"),
            ("3-grams", "order_3"),
            ("4-grams", "order_4"),
        )
    ]
    for title, arm in (("MoE", "moe"), ("Engram", "engram")):
        for precision, demo in demos().items():
            each = demo["summary"]
            cells = [
                f"{each[f'{arm}_{unit}_mean']:.4f} ± {each[f'{arm}_{unit}_t95']:.4f}"
                for unit in ("loss", "bpb")
            ]
            rows.append(f"| {title}, {precision} | {' | '.join(cells)} | |")
    return rows


def retrofit() -> dict[str, float]:
    return record("retrofit")["summary"]


def docstring_rows() -> list[str]:
    """Of docs/ecosystem.md: bits per byte on docstrings, the worst first."""
    flat, counts = retrofit(), counted()
    titles = {
        "memory_new": "memory",
        "lora_flops_new": "LoRA, equal FLOPs",
        "lora_parameters_new": "LoRA, equal parameters",
        "memory_lora_new": "memory + LoRA",
        "full_new": "all parameters",
        "backbone_new": "the backbone, before",
    }
    found = {title: (flat, f"{name}_bpb") for name, title in titles.items()}
    for order in (1, 2, 3, 4):
        found[f"counted: {order}-grams"] = counts, f"docstrings_order_{order}_bpb"
    rows = {
        title: (f"{name}_mean", of(each, name, form=".3f")) for title, (each, name) in found.items()
    }
    ordered = sorted(found, key=lambda title: -found[title][0][rows[title][0]])
    uniform = f"| uniform | {counts['docstrings_uniform_bpb_mean']:.3f} |"
    return [uniform, *(f"| {title} | {rows[title][1]} |" for title in ordered)]


def unigrams_share() -> float:
    """Of memory's gain over the backbone."""
    flat = retrofit()
    gained = flat["backbone_new_bpb_mean"] - counted()["docstrings_order_1_bpb_mean"]
    return gained / flat["memory_gain_mean"]


def test_the_bands_say_who_gains_and_who_pays():
    all_there(band_rows(), BANDS)
    all_there(bands_said(), BANDS)
    study = TwoSource("two_source_text").bands["difference_bands"][0]
    told = {row["band"]: row["mean"] / half_width(row["standard_error"], 3) for row in study}
    assert told["never"] > 1 and told["1-9"] > 1 and told["10-99"] < -1
    assert abs(told["100 and more"]) < 1  # "cannot be told"
    sums = {row["band"]: row["mean"] * row["tokens"] for row in study}
    assert sums["10-99"] < sum(sums.values()) < 0  # "all there is and more"
    for row in band_rows():  # "in the demo no band is told to lose"
        for cell in row.split(" | ")[3:]:
            mean, half = map(float, cell.rstrip(" |").split(" ± "))
            assert mean < half
    nats, bpb = text_gain()
    share = bpb["mean"] / -demos()["bf16"]["summary"]["difference_bpb_mean"]
    assert 0.45 < share < 0.55  # "about half"
    said = f"about half, {bpb['mean']:.4f} ± {bpb['t95']:.4f} bits per byte"
    lost = band_rows()[0].split(" | ")[2].lstrip("+")
    assert said in README and f"never seen in training lose {lost} nats" in README
    assert f"it is {nats['mean']:.3f} ± {nats['t95']:.3f}" in LOG and f"lose {lost} nats" in LOG


def test_what_counting_gives_stands_beside_the_demo():
    flat, rows = counted(), count_rows()
    all_there(rows, BANDS)
    seconds = f"{flat['wordnet_windows_order_4_fit_seconds']:.1f} s"
    assert f"counted in {seconds} (order 4)" in BANDS and f"fitted in {seconds}" in README
    cells = (
        f"{flat['wordnet_windows_order_4_nats']:.4f} | {flat['wordnet_windows_order_4_bpb']:.4f}"
    )
    assert f"| 4-grams counted, nothing learned | {cells} | {cells} |" in README
    assert f"{flat['wordnet_windows_order_4_bpb']:.4f} bits per byte" in LOG
    for demo in demos().values():  # the same tokens and bytes; "better", and "not told from"
        each, loss = demo["summary"], flat["wordnet_windows_order_4_nats"]
        for seed in demo["raw"].values():
            assert seed["validation_tokens"] == flat["wordnet_windows_order_4_tokens"]
            assert seed["moe_bpb"] / seed["moe_loss"] == pytest.approx(
                flat["wordnet_windows_order_4_bpb"] / loss
            )
        assert loss < each["moe_loss_mean"] - each["moe_loss_t95"]
        assert abs(loss - each["engram_loss_mean"]) < each["engram_loss_t95"]


def test_tokens_a_second_are_those_of_the_results_that_are_named():
    speed = record("train_step")["summary"]
    pages = page("docs/speed.md"), README
    for text in pages:
        for demo in demos().values():
            each = demo["summary"]
            assert f"{each['speed_ratio_mean']:.3f} ± {each['speed_ratio_t95']:.3f} in" in text
    both = f"{speed['ratio_of_medians']:.2f}x as the ratio of medians and "
    assert f"{both}{speed['median_ratio_of_pairs']:.2f}x as the median" in README


def test_numbers_of_the_retrofit_study_are_those_of_its_result():
    result, runs = retrofit(), record("retrofit")["raw"]["runs"]
    text = (ROOT / "docs" / "ecosystem.md").read_text()
    rows = {
        "memory": "memory",
        "lora_flops": "LoRA, equal FLOPs",
        "lora_parameters": "LoRA, equal parameters",
        "full": "all parameters",
        "memory_lora": "memory + LoRA",
    }
    for arm, label in rows.items():
        flops = result.get(f"{arm}_trainable_flops")
        cells = [of(result, f"{arm}_{name}", form=".3f") for name in MEASURED]
        assert (
            f"| {label} | {result[f'{arm}_trained_parameters'] / 1e6:.2f}M "
            f"| {'-' if flops is None else f'{flops / 1e6:.1f}M'} "
            f"| {result[f'{arm}_step_flops'] / 1e6:.1f}M | {' | '.join(cells)} |\n"
        ) in text
        assert not result[f"{arm}_lr_at_edge"]
    for name in ("lora_flops_new_bpb", "lora_flops_forgetting", "lora_parameters_new_bpb"):
        assert of(result, f"memory_minus_{name}", form="+.3f") in ECOSYSTEM
    for name in ("backbone_new_bpb", "backbone_old_bpb"):
        assert of(result, name, form=".3f") in ECOSYSTEM
    assert f"A Llama of {result['backbone_parameters'] / 1e6:.2f}M parameters" in ECOSYSTEM
    assert f"read {result['tokens'] / 1e3:.0f}k tokens of something else" in ECOSYSTEM
    ours = result["memory_trainable_flops"]
    assert f"at {result['lora_parameters_trainable_flops'] / ours:.0f}x the trainable" in ECOSYSTEM
    assert f"come near it at {result['memory_lora_trainable_flops'] / ours:.0f}x" in ECOSYSTEM
    for seed in runs.values():  # the log: LoRA is ahead in every seed
        assert seed["arms"]["lora_flops"]["new_bpb"] < seed["arms"]["memory"]["new_bpb"]
    tried = {each["lr"]: each for each in runs["0"]["searched"]["memory"]}
    high, lora = tried[max(tried)], runs["0"]["arms"]["lora_flops"]
    assert max(tried) == pytest.approx(3 * result["memory_lr"])
    assert high["old_bpb"] >= lora["old_bpb"] and high["new_bpb"] >= lora["new_bpb"]
    for arm in ("memory", "lora_flops"):
        new, gain, forgotten = (of(result, f"{arm}_{name}", form=".3f") for name in MEASURED)
        assert new in README and forgotten in README and gain in LOG and forgotten in LOG


MEASURED = ("new_bpb", "gain", "forgetting")


def test_the_frontier_on_the_page_is_that_of_the_result(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import retrofit_figure

    runs = retrofit_figure.points(record("retrofit")["raw"]["runs"])
    assert len(runs) == 15
    text = (ROOT / "docs" / "ecosystem.md").read_text()
    assert f"\n{retrofit_figure.table(runs)}\n" in text
    best = retrofit_figure.frontier(runs)
    for run in runs:  # by the definition, one pair at a time
        beaten = any(
            other.gain >= run.gain and other.forgetting <= run.forgetting and other != run
            for other in runs
        )
        assert (run in best) is not beaten
    near = [run for run in runs if 1.4 < run.gain < 1.55]
    own = min(near, key=lambda run: run.forgetting)
    others = [run.forgetting for run in near if run.arm != "memory"]
    assert own.arm == "memory" and own.taken
    assert (
        f"{own.forgetting:.3f}, where the other arms' runs that gain 1.4 to 1.55 forget "
        f"{min(others):.3f} to {max(others):.3f}"
    ) in ECOSYSTEM
    assert {run.arm for run in best if run.gain <= own.gain} == {"memory"}
    assert all(run.arm != "memory" for run in best if run.gain > own.gain)


def test_what_counting_gives_on_docstrings_stands_beside_the_arms():
    rows = docstring_rows()
    text = (ROOT / "docs" / "ecosystem.md").read_text()
    assert "\n".join(rows) in text  # in this order
    assert f"gives {100 * unigrams_share():.0f} % of memory's gain" in ECOSYSTEM
    at = {row.split(" | ")[0].lstrip("| "): place for place, row in enumerate(rows)}
    frozen = ("memory", "LoRA, equal FLOPs", "LoRA, equal parameters", "memory + LoRA")
    assert all(at["counted: 2-grams"] > at[arm] for arm in frozen)
    assert at["counted: 4-grams"] > at["all parameters"]
    flat = counted()
    for order in (1, 2):
        assert f"{order}-grams" in README
        assert f"{flat[f'docstrings_order_{order}_bpb_mean']:.3f}" in README


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda p: p.stem)
def test_results_of_uncommitted_changes_are_called_so_where_they_are_quoted(path):
    commits = re.findall(r'"commit": "([^"]+)"', path.read_text())
    if not any("dirty" in each or "uncommitted" in each for each in commits):
        return
    quoted = 0
    for each in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for paragraph in re.split(r"\n\n+", each.read_text()):
            if f"results/{path.name})" in paragraph:
                quoted += 1
                assert "uncommitted changes" in paragraph.replace("\n", " "), each
    assert quoted, "nowhere quoted"


PLUS_MINUS = re.compile(r"standard error|95 % interval")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_a_page_with_a_sign_of_plus_or_minus_says_what_stands_behind_it(path):
    text = path.read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    for section in sections:
        if "±" in section:
            said = section.replace("\n", " ")
            assert PLUS_MINUS.search(said) and "standard deviation over" not in said, section[:60]


CODE = [
    path
    for room in ("engram_lm", "recipes", "benchmarks")
    for path in sorted((ROOT / room).rglob("*.*"))
    if path.suffix in (".py", ".html") and "±" in path.read_text()
]


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.name)
def test_code_that_prints_a_sign_of_plus_or_minus_says_what_stands_behind_it(path):
    assert re.search("standard error|95 %|PLUS_MINUS", path.read_text())
