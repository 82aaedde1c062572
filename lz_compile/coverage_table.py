"""The pages of ``lz-compile coverage``: a summary, Markdown, and a picture in SVG.

Enters: rows of :mod:`lz_compile.coverage`.  Leaves: text.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from lz_compile.coverage_child import CallRow, Row
from lz_compile.region import INDUCTOR


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts over all rows.

    ``share`` is the part of attention sites that was recognised, None without sites; ``compile_ratio`` the median over
    calls of layerzero's first call over Inductor's, None where Inductor did not run.
    """
    ran = [(row, call) for row in rows for call in row.calls if not call.not_called]
    sites, recognised = sum(call.sites for _, call in ran), sum(call.recognised for _, call in ran)
    ratios = [c.seconds / c.inductor_seconds for _, c in ran if c.seconds and c.inductor_seconds]
    return {
        "architectures": len({row.name for row, _ in ran}),
        "not_run": sum(all(call.not_called for call in row.calls) for row in rows),
        "calls": len(ran),
        "sites": sites,
        "recognised": recognised,
        "share": recognised / sites if sites else None,
        "wrong": sum(bool(call.wrong) for _, call in ran),
        "failed": sum(bool(call.failed and not call.inductor_failed) for _, call in ran),
        "fell_back": sum(bool(call.fell_back) for _, call in ran),
        "no_float64": sum(call.reference != "float64" for _, call in ran),
        "compile_ratio": statistics.median(ratios) if ratios else None,
        "compile_pairs": len(ratios),
    }


def sentence(facts: dict[str, Any]) -> str:
    """The summary in words."""
    share = "" if facts["share"] is None else f" ({100 * facts['share']:.1f}%)"
    text = (
        f"{facts['architectures']} architectures, {facts['calls']} calls: {facts['recognised']} of {facts['sites']} "
        f"attention sites recognised{share}, {facts['wrong']} wrong results, {facts['failed']} compiles that fail "
        f"where Inductor's does not, {facts['fell_back']} graphs left to Inductor by a failure of ours"
    )
    if facts["compile_ratio"] is not None:
        text += f", compile time {facts['compile_ratio']:.2f}x Inductor's (median of {facts['compile_pairs']})"
    return text


# -- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], command: str, picture: str) -> str:
    """The page: how it was made, the summary, a table with a line for each call, and everything that is not well."""
    facts = summary(rows)
    ran = [(row, call) for row in rows for call in row.calls if not call.not_called]
    lines = [
        "# Coverage",
        "",
        f"Written by `{command}` ({', '.join(sorted({row.versions for row in rows if row.versions}))}).",
        "Tiny random models, float32, batch 2, 24 tokens (the first row padded on the right by 5), on the CPU: a",
        "forward pass without cache, and where the model generates a decode step (in a static cache, if it has one).",
        "",
        f"**{sentence(facts)}.**",
        "",
        f"![Sites, errors and compile times of every architecture]({picture})",
        "",
        "A *site* is one attention core that eager runs, *recognised* one whose region may be replaced. Masks: none,",
        "proved (the kernel relies on a proof), honoured (the kernel reads the mask as it is). Norm, MLP, RoPE and",
        "MoE: regions that patterns find (RMSNorm, GLU, rotations, routed experts; LayerNorm and plain MLPs are",
        "Inductor's) beside modules that ran. Errors: largest difference from a float64 run over its largest value,",
        "median of three inputs; `~` marks models that do not run in float64 (there the reference is eager float32).",
        "",
        "| model | call | attention | masks | kernels | norm | MLP | RoPE | MoE | error | eager | compile s "
        "| Inductor |",
        "|---|---|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(_line(row, call) for row, call in ran),
    ]
    lines += _misses(ran)
    sections: list[tuple[str, Callable[[CallRow], str]]] = [
        ("Wrong results", lambda call: call.wrong),
        ("Compiles that failed", _failure),
        ("Graphs left to Inductor by a failure of ours", lambda call: call.fell_back),
        ("Recognised, but no kernel takes it", lambda call: _some(call.kernels.get(INDUCTOR, 0))),
        (
            "Softmaxes in attention modules without a product on either side, not counted",
            lambda call: _some(call.other_softmax),
        ),
    ]
    for title, what in sections:
        lines += _listed(title, [(_at(row, call), what(call)) for row, call in ran if what(call)])
    absent = [(row.name, row.problem) for row in rows if row.problem]
    absent += [(_at(r, c), c.not_called) for r in rows for c in r.calls if c.not_called]
    lines += _listed("Not built or not called here", absent)
    return "\n".join(lines) + "\n"


def _failure(call: CallRow) -> str:
    return call.failed + (f" (Inductor too: {call.inductor_failed})" if call.failed and call.inductor_failed else "")


def _some(count: int) -> str:
    return str(count) if count else ""


def _line(row: Row, call: CallRow) -> str:
    mark = "" if call.reference == "float64" else "~"
    cells = [
        f"{row.name} ({row.attention})",
        call.name,
        f"{call.recognised}/{call.sites}" if call.recognised == call.sites else f"**{call.recognised}/{call.sites}**",
        ", ".join(f"{kind} {n}" for kind, n in call.masks.items()),
        _kernels(call.kernels),
        *(f"{call.regions.get(kind, 0)}/{call.modules.get(kind, 0)}" for kind in ("norm", "mlp", "rope", "moe")),
        "failed" if call.failed else mark + _number(call.error),
        mark + _number(call.eager_error),
        "" if call.seconds is None else f"{call.seconds:.1f}",
        "" if call.inductor_seconds is None else f"{call.inductor_seconds:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _misses(ran: Sequence[tuple[Row, CallRow]]) -> list[str]:
    """Sites that were not recognised: one line for equal ones, with the first node."""
    groups: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for row, call in ran:
        for miss in call.misses:
            kind = re.sub(r"^\S+ = | \[.*$", "", miss.node)
            groups.setdefault((miss.reason, kind), []).append((_at(row, call), miss.module, miss.node))
    found = []
    for (reason, _), sites in sorted(groups.items(), key=lambda item: -len(item[1])):
        where = ", ".join(f"{at} {n}" for at, n in Counter(at for at, _, _ in sites).items())
        node = f", stopped at `{sites[0][2]}`" if sites[0][2] else ""
        found.append((f"{len(sites)} sites: {reason}", f"{where}; first in `{sites[0][1] or 'the top level'}`{node}"))
    return _listed("Sites that were not recognised", found)


def _listed(title: str, entries: Sequence[tuple[str, str]]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {what}: {why}" for what, why in entries)] if entries else []


def _at(row: Row, call: CallRow) -> str:
    return f"{row.name} {call.name}"


def _kernels(kernels: dict[str, int]) -> str:
    return ", ".join(name if len(kernels) == 1 else f"{name} {n}" for name, n in kernels.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


# -- the picture -------------------------------------------------------------------------------------------------------

_COLORS = {"all": "#2e7d32", "some": "#f9a825", "none": "#c62828", "no sites": "#b0bec5", "not run": "#eceff1"}
_TILE, _COLUMNS, _PLOT, _MARGIN = 16, 50, 340, 56


def picture(rows: Sequence[Row]) -> str:
    """A tile for each architecture by the sites that were recognised, errors beside eager's, and compile times beside
    Inductor's where there are any; the names show on hovering."""
    tiles, bottom = _tiles(rows)
    calls = [(f"{row.name} {call.name}", call) for row in rows for call in row.calls if not call.not_called]
    errors = [(n, c.eager_error, c.error) for n, c in calls if c.reference == "float64"]
    times = [(n, c.inductor_seconds, c.seconds) for n, c in calls]
    plots = [_scatter(errors, "eager's error against float64", "layerzero's error", 1.5, _MARGIN, bottom + 40)]
    if any(x and y for _, x, y in times):
        left = 2 * _MARGIN + _PLOT
        plots.append(_scatter(times, "Inductor's first call, s", "layerzero's first call, s", 1.15, left, bottom + 40))
    width, height = _TILE * _COLUMNS + 2 * 20, bottom + 40 + _PLOT + 50
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join([*tiles, *plots])
        + "\n</svg>\n"
    )


def _tiles(rows: Sequence[Row]) -> tuple[list[str], float]:
    parts, states = [], Counter(_state(row) for row in rows)
    x = 20.0
    for state, color in _COLORS.items():
        parts.append(f'<rect x="{x:g}" y="12" width="12" height="12" fill="{color}"/>')
        label = f"{'sites recognised: ' if state in ('all', 'some', 'none') else ''}{state} {states[state]}"
        parts.append(f'<text x="{x + 17:g}" y="22">{label}</text>')
        x += 160
    ordered = sorted(rows, key=lambda row: (list(_COLORS).index(_state(row)), row.name))
    for i, row in enumerate(ordered):
        left, top = 20 + _TILE * (i % _COLUMNS), 36 + _TILE * (i // _COLUMNS)
        text = f"{row.name}: " + (row.problem or ", ".join(f"{c.name} {c.recognised}/{c.sites}" for c in row.calls))
        parts.append(
            f'<rect x="{left}" y="{top}" width="{_TILE - 2}" height="{_TILE - 2}" fill="{_COLORS[_state(row)]}">'
            f"<title>{escape(text)}</title></rect>"
        )
    return parts, 36 + _TILE * math.ceil(len(rows) / _COLUMNS)


def _state(row: Row) -> str:
    ran = [call for call in row.calls if not call.not_called]
    sites, recognised = sum(call.sites for call in ran), sum(call.recognised for call in ran)
    if not ran:
        return "not run"
    if not sites:
        return "no sites"
    return "all" if recognised == sites else "some" if recognised else "none"


def _scatter(points: Sequence[Any], across: str, up: str, limit: float, left: float, top: float) -> str:
    """Log-log, with a line at ``y = x`` and a dashed one at ``y = limit * x``."""
    kept = [(n, x, y) for n, x, y in points if x and y and math.isfinite(x) and math.isfinite(y)]
    values = [v for _, *pair in kept for v in pair] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    high = max(high, low + 1)

    def place(value: float) -> float:
        return _PLOT * (math.log10(value) - low) / (high - low)

    parts = [f'<rect x="{left:g}" y="{top:g}" width="{_PLOT}" height="{_PLOT}" fill="none" stroke="#90a4ae"/>']
    for power in range(low, high + 1):
        at = place(10.0**power)
        parts.append(f'<text x="{left + at:.0f}" y="{top + _PLOT + 15:g}" text-anchor="middle">1e{power}</text>')
        parts.append(f'<text x="{left - 5:g}" y="{top + _PLOT - at + 4:.0f}" text-anchor="end">1e{power}</text>')
    for slope, dash in ((1.0, ""), (limit, ' stroke-dasharray="4"')):
        lift = _PLOT * math.log10(slope) / (high - low)
        parts.append(
            f'<line x1="{left:g}" y1="{top + _PLOT - lift:.1f}" x2="{left + _PLOT - lift:.1f}" y2="{top:g}" '
            f'stroke="#90a4ae"{dash}/>'
        )
    for name, x, y in kept:
        parts.append(
            f'<circle cx="{left + place(x):.1f}" cy="{top + _PLOT - place(y):.1f}" r="3" fill="#1565c0" '
            f'fill-opacity="0.5"><title>{escape(name)}: {x:.2g}, {y:.2g}</title></circle>'
        )
    parts.append(f'<text x="{left + _PLOT / 2:g}" y="{top + _PLOT + 34:g}" text-anchor="middle">{across}</text>')
    turn = f"rotate(-90 {left - 38:g} {top + _PLOT / 2:g})"
    parts.append(f'<text x="{left - 38:g}" y="{top + _PLOT / 2:g}" text-anchor="middle" transform="{turn}">{up}</text>')
    return "\n".join(parts)
