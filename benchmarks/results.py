"""Results: a JSON file that measures are merged into by name, a table of it, and docs/performance.md with table and plot."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Measure
from xdist.plots import PALETTE, STYLE

BEGIN, END = "<!-- results: written by python -m benchmarks -->", "<!-- end of results -->"
Entry = dict[str, Any]


def entry(measure: Measure, facts: Entry) -> Entry:
    """A measure as it is kept: medians and the best of each side, how many times as good we are, and the facts of its run."""
    best = min if measure.less else max
    peer = {"peer": statistics.median(measure.peer), "peer_best": best(measure.peer)} if measure.peer else {"peer": None, "peer_best": None}
    return {
        "name": measure.name, "unit": measure.unit, "ours": statistics.median(measure.ours), "ours_best": best(measure.ours), **peer,
        "ratio": measure.ratio, "less_is_better": measure.less, "against": measure.against, "note": measure.note,
        "repeats": len(measure.ours), **facts,
    }  # fmt: skip


def merge(path: Path, entries: Sequence[Entry]) -> list[Entry]:
    """Put entries into the file, each in the place of the one of its name; gives all, in the order in which names first came."""
    known = {found["name"]: found for found in json.loads(path.read_text("utf-8"))} if path.exists() else {}
    merged = list((known | {found["name"]: found for found in entries}).values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return merged


def number(value: float | None) -> str:
    """Three digits or more, as people write them; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def row(found: Entry) -> list[str]:
    """The cells of one line of a table: measure, unit, ours, peer, ratio, peer's name."""
    ratio = "–" if found["ratio"] is None else f"{found['ratio']:.2f} ×"
    return [
        found["name"],
        found["unit"],
        number(found["ours"]),
        number(found["peer"]),
        ratio,
        found["against"] if found["ratio"] else found["note"],
    ]


HEAD = ["measure", "unit", "xdist", "peer", "ratio", "peer is"]


def table(entries: Sequence[Entry]) -> str:
    """Medians in columns, for a terminal."""
    rows = [HEAD, *map(row, entries)]
    widths = [max(len(cells[place]) for cells in rows) for place in range(len(HEAD))]
    aligned = [
        [cell.rjust(width) if 1 < n < 5 else cell.ljust(width) for n, (cell, width) in enumerate(zip(r, widths, strict=True))] for r in rows
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def markdown(entries: Sequence[Entry]) -> str:
    """Medians as a table, with best values and notes, under the facts of the machines that they were measured on."""
    lines = ["![Ratios to the peers](performance.png)", ""]
    for facts in dict.fromkeys(_facts(found) for found in entries):
        here = [found for found in entries if _facts(found) == facts]
        about = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in json.loads(facts).items() if value is not None)
        commits = dict.fromkeys(found["versions"]["xdist"] for found in here if "xdist" in found["versions"])
        about += f", xdist {', '.join(commits)}" if commits else ""
        dates = " to ".join(dict.fromkeys([min(found["date"] for found in here), max(found["date"] for found in here)]))
        lines += [f"{dates}; {about}.", "", "| " + " | ".join([*HEAD[:4], "best", *HEAD[4:], "note"]) + " |", "|---" * 8 + "|"]
        for found in here:
            name, unit, ours, peer, ratio, _ = row(found)
            best = f"{number(found['ours_best'])} / {number(found['peer_best'])}"
            lines.append("| " + " | ".join([name, unit, ours, peer, best, ratio, found["against"], found["note"]]) + " |")
        lines.append("")
    commands = sorted({found["command"] for found in entries})
    return "\n".join([*lines, "Measured by " + ", ".join(f"`{command}`" for command in commands) + "."])


def _facts(found: Entry) -> str:
    """Machine and versions of a measure, as one text; the project's own commit is apart, since measures are renewed one by one."""
    return json.dumps(found["machine"] | {name: version for name, version in found["versions"].items() if name != "xdist"})


def document(path: Path, entries: Sequence[Entry]) -> None:
    """Write table and plot into the page, between its markers and beside it."""
    before, _, rest = path.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{markdown(entries)}\n\n{END}{after}", "utf-8")
    plot(path.with_suffix(".png"), entries)


def plot(path: Path, entries: Sequence[Entry]) -> None:
    """Bars of the ratios, on a logarithmic axis, from as good as the peer on."""
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    shown = [found for found in entries if found["ratio"]][::-1]
    with matplotlib.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(10, 1.2 + 0.3 * len(shown)), layout="constrained")
        values = [found["ratio"] for found in shown]
        names = [f"{found['name']} | {found['against']}" for found in shown]
        bars = axis.barh(
            names, [value - 1 for value in values], left=1, color=[PALETTE[0] if value >= 1 else PALETTE[1] for value in values]
        )
        axis.bar_label(bars, [f"{value:.2f} ×" for value in values], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g} ×")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.axvline(1, color="#444", lw=1)
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.15)
        axis.set_title("Times as good: measure | peer")
        figure.savefig(path, format="png", dpi=130, bbox_inches="tight")
        pyplot.close(figure)
