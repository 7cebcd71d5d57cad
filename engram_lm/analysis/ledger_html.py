"""Where the parameters and FLOPs of two models are, side by side, as an HTML table."""

from collections.abc import Sequence

from engram_lm.analysis.escape import escape
from engram_lm.analysis.results import ArmResult

_COLUMNS = ("parameters", "active per token", "FLOPs per token")


def ledger_table(arms: Sequence[ArmResult]) -> str:
    """One row for each component that any arm has, then the sums and how far apart they are."""
    ledgers = [arm.log.ledger for arm in arms]
    components = [{row["name"]: row for row in ledger["components"]} for ledger in ledgers]
    body = []
    for name in dict.fromkeys(name for rows in components for name in rows):
        rows = [each.get(name) for each in components]
        cells = [None if row is None else row["total"] for row in rows]
        cells += [None if row is None else row["active"] for row in rows]
        cells += [None if row is None else row["flops"] for row in rows]
        if not any(cells):  # a part that neither arm has
            continue
        left_out = any(row is not None and not row["counted"] for row in rows)
        label = escape(name) + (" (not in P<sub>tot</sub>)" if left_out else "")
        body.append(_row(label, [_count(cell) for cell in cells], len(arms)))
    totals = [ledger["p_tot"] for ledger in ledgers]
    actives = [ledger["p_act"] for ledger in ledgers]
    flops = [ledger["flops_per_token"] for ledger in ledgers]
    rhos = [ledger["rho"] for ledger in ledgers]
    foot = [
        _row(
            "P<sub>tot</sub>, P<sub>act</sub>, FLOPs",
            [_count(value) for value in (*totals, *actives, *flops)],
            len(arms),
            "sum",
        ),
        _row(
            f"against {escape(arms[0].name)}",
            [text for values in (totals, actives, flops) for text in _gaps(values)],
            len(arms),
        ),
        _row(
            "P<sub>tot</sub> − P<sub>act</sub>", [_count(x["p_sparse"]) for x in ledgers], len(arms)
        ),
        _row("ρ", ["–" if rho is None else f"{rho:.3f}" for rho in rhos], len(arms)),
        _row("optimiser, bytes", [_count(x["optimizer_bytes"]) for x in ledgers], len(arms)),
    ]
    kinds = "".join(
        f'<th class="n gap" colspan="{len(arms)}" scope="colgroup">{kind}</th>' for kind in _COLUMNS
    )
    names = "".join(
        f'<th class="n{_gap(place)}" scope="col">{escape(arm.name)}</th>'
        for _ in _COLUMNS
        for place, arm in enumerate(arms)
    )
    return (
        f'<table class="ledger"><thead><tr><td></td>{kinds}</tr>'
        f'<tr><th scope="col">component</th>{names}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody><tbody>{''.join(foot)}</tbody></table>"
    )


def _row(label: str, cells: Sequence[str], arms: int, kind: str = "") -> str:
    drawn = "".join(
        f'<td class="n{_gap(place % arms)}">{cell}</td>' for place, cell in enumerate(cells)
    )
    empty = len(_COLUMNS) * arms - len(cells)
    rest = f'<td colspan="{empty}"></td>' if empty else ""
    return f'<tr class="{kind}"><th scope="row">{label}</th>{drawn}{rest}</tr>'


def _gap(place: int) -> str:
    return "" if place else " gap"


def _count(value: int | None) -> str:
    return f"{value:,}" if value else "–"


def _gaps(values: Sequence[int]) -> list[str]:
    gaps = (f"{value / values[0] - 1:+.2%}" for value in values[1:])
    return ["", *(gap.replace("-", "\u2212") for gap in gaps)]
