"""The rows of ``adm-rt bench sample`` as a bar chart: speed relative to eager PyTorch.

``python -m adm_rt.benchmarking.chart ROWS.json [ROWS.json ...] CHART.png`` draws saved rows.
"""

from __future__ import annotations

import json
import os
import sys

from adm_rt.benchmarking.contenders import CONTENDERS, OURS

_OURS_COLOURS = ("#c2410c", "#fb923c")
_OTHER_COLOURS = {
    "eager": "#94a3b8",
    "native_1": "#fed7aa",
    "compile": "#64748b",
    "onnxruntime": "#3b82f6",
    "openvino": "#0f766e",
}


def speeds(rows):
    """(name, sizes, threads) -> contender -> (speed relative to eager, ms), in the rows' order.

    Where a case was run several times, a contender's numbers are those of its first run, against
    eager in that run. Raises ValueError for a run without eager PyTorch.
    """
    runs = {}  # (case, our time): the rows of one run name the same one
    for row in rows:
        case = row["name"], row["sizes"], row["threads"]
        times = runs.setdefault((case, row["ours_ms"]), {})
        times[row["baseline"]] = row["baseline_ms"]
        times[row["ours"]] = row["ours_ms"]
    result = {}
    for (case, _), times in runs.items():
        if "eager" not in times:
            raise ValueError(f"{case[0]}: no row against eager, which the chart is relative to")
        for name, ms in times.items():
            result.setdefault(case, {}).setdefault(name, (times["eager"] / ms, ms))
    return result


def draw(rows, path):
    """Write the PNG; it appears whole or not at all. ImportError names what is missing."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            f"a chart needs matplotlib ({error}): pip install 'adm_rt[bench]'"
        ) from error
    table = speeds(rows)
    order = [*CONTENDERS["cpu"]]
    names = sorted({n for bars in table.values() for n in bars}, key=order.index)
    names = [n for n in names if n not in OURS] + [n for n in reversed(OURS) if n in names]
    bars_in_all = sum(len(bars) for bars in table.values())
    figure, axes = pyplot.subplots(
        figsize=(8, 1.0 + 0.17 * (bars_in_all + len(table))), constrained_layout=True
    )
    top, centres = 0.0, []
    for bars in table.values():
        for j, name in enumerate(n for n in names if n in bars):
            ratio, ms = bars[name]
            axes.barh(top + j, ratio, 0.9, color=_colour(name))
            text = f" {ratio:.2f}x  {_time(ms)}"
            axes.text(ratio, top + j, text, va="center", fontsize=7.5, color="#334155")
        centres.append(top + (len(bars) - 1) / 2)
        top += len(bars) + 1
    labels = [
        f"{name}\n{sizes}, {threads} thread{'s' * (threads > 1)}" for name, sizes, threads in table
    ]
    axes.set_yticks(centres, labels, fontsize=7.5)
    axes.set_ylim(top - 1.3, -0.7)
    axes.axvline(1, color="#94a3b8", linewidth=0.8)
    axes.set_xlim(0, 1.22 * max(ratio for bars in table.values() for ratio, _ in bars.values()))
    axes.set_xlabel("speed relative to eager PyTorch (higher is better)", fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=_colour(n)) for n in names]
    titles = [CONTENDERS["cpu"][n].title for n in names]
    figure.legend(handles, titles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    machine = f"{rows[0]['processor']}, {rows[0]['isa']}"
    figure.text(0.995, 0.004, machine, ha="right", fontsize=6.5, color="#94a3b8")
    temporary = f"{path}.part"
    try:
        figure.savefig(temporary, dpi=150, format="png")
        os.replace(temporary, path)
    finally:
        pyplot.close(figure)
        if os.path.exists(temporary):
            os.remove(temporary)


def _colour(name):
    return _OURS_COLOURS[OURS.index(name)] if name in OURS else _OTHER_COLOURS[name]


def _time(ms):
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.1f} ms"


def main(argv):
    """Draw saved rows; exit code."""
    if len(argv) < 2:
        print("usage: python -m adm_rt.benchmarking.chart ROWS.json [...] CHART.png")
        return 2
    rows = []
    for path in argv[:-1]:
        with open(path) as file:
            rows += json.load(file)
    draw(rows, argv[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
