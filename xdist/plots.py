"""The report's pictures, with matplotlib: each as PNG and SVG bytes."""

import base64
import io
import math
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np

from xdist import files
from xdist.config import Recipe
from xdist.evaluate import MODELS
from xdist.spaces import Space

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

COLOURS = {"teacher": "#9aa5b1", "before": "#e0b04c", "after": "#1f6f8b", "tfidf": "#a4505f"}
LABELS = {"teacher": "teacher", "before": "student before", "after": "student after", "tfidf": "character TF-IDF"}
PALETTE = ["#1f6f8b", "#e07a5f", "#81b29a", "#e0b04c", "#6d597a", "#9aa5b1", "#355070", "#b56576", "#43aa8b", "#577590"]
SMOOTH = 5  # measures of single batches are noisy: batches differ in length and kind of text
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e9ed", "axes.axisbelow": True,
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "svg.hashsalt": "xdist",
}  # fmt: skip

Picture = tuple[bytes, bytes]


def draw(recipe: Recipe, found: dict[str, Any]) -> dict[str, Picture]:
    """All pictures for which there is data, by name."""
    drawers = {
        "results": _results, "few_shot": _few_shot, "curves": _curves, "composition": _composition, "rejects": _rejects,
        "lengths": _lengths, "projection": _projection,
    }  # fmt: skip
    return _drawn(drawers, recipe, found)


def write(folder: str, pictures: dict[str, Picture]) -> None:
    """Keep pictures in <folder>/plots."""
    for name, (png, svg) in pictures.items():
        files.write(f"{folder}/plots/{name}.png", png)
        files.write(f"{folder}/plots/{name}.svg", svg)


def page(template: str, pictures: dict[str, Picture], **values: Any) -> str:
    """A template of this package as one self-contained page: text is escaped, pictures are inside."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("xdist", "."), autoescape=True)
    images = {name: base64.b64encode(png).decode() for name, (png, _) in pictures.items()}
    return environment.get_template(template).render(images=images, **values)


def draw_search(space: Space, rows: list[dict[str, Any]]) -> dict[str, Picture]:
    """The pictures of a search, by name: trials against each key, and their curves."""
    return _drawn({"keys": _keys, "trials": _trials}, space, rows)


def draw_study(recipe: Recipe, measure: str, entries: list[dict[str, Any]]) -> dict[str, Picture]:
    """The picture of a low-resource study in one measure, by name."""
    return _drawn({f"study_{measure}": _study}, recipe, measure, entries)


def _drawn(drawers: dict[str, Callable[..., Figure | None]], *arguments: Any) -> dict[str, Picture]:
    out = {}
    with matplotlib.rc_context(STYLE):
        for name, drawer in drawers.items():
            figure = drawer(*arguments)
            if figure is not None:
                out[name] = _bytes(figure)
                pyplot.close(figure)
    return out


def _bytes(figure: Figure) -> Picture:
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=130, bbox_inches="tight")
    figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def _results(recipe: Recipe, found: dict[str, Any]) -> Figure | None:
    """Per task and language: the teacher, the student before and after, with 95 % intervals."""
    from xdist.report import headline

    rows = headline(found["evaluation"])
    names = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    if not names:
        return None
    figure, axes = _grid(len(names), 3.2)
    for axis, (task, metric) in zip(axes, names, strict=True):
        here = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        languages = list(dict.fromkeys(row["language"] for row in here))
        for offset, model in enumerate(MODELS):
            bars = {row["language"]: row for row in here if row["model"] == model}
            values = np.array([100 * bars[lang]["value"] for lang in languages])
            spread = np.abs(np.array([[100 * bars[lang][side] for lang in languages] for side in ("low", "high")]) - values)
            places = np.arange(len(languages)) + 0.27 * (offset - 1)
            axis.bar(places, values, 0.25, yerr=spread, color=COLOURS[model], label=LABELS[model], error_kw={"lw": 1, "ecolor": "#444"})
        english = [row for row in here if row["model"] == "teacher" and row["language"] == recipe.data.source_language]
        if english:
            axis.axhline(100 * english[0]["value"], color="#444", lw=1, ls="--")
        axis.set_xticks(range(len(languages)), languages)
        axis.grid(axis="x", visible=False)
        axis.set_title(f"{task}\n{metric.replace('_', ' ')}")
    return _labelled(figure, axes, "× 100")


def _grid(panels: int, height: float) -> tuple[Figure, list[Any]]:
    """A figure of this many panels, three in a row at most, that share the vertical axis."""
    across = min(3, panels)
    down = -(-panels // across)
    size = (1 + 3.4 * across, 0.6 + height * down)
    figure, axes = pyplot.subplots(down, across, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in list(axes.flat)[panels:]:
        axis.set_visible(False)
    return figure, list(axes.flat)[:panels]


def _labelled(figure: Figure, axes: list[Any], name: str) -> Figure:
    """The name of the first panel's vertical axis, and one legend for all panels."""
    axes[0].set_ylabel(name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _few_shot(recipe: Recipe, found: dict[str, Any]) -> Figure | None:
    """Accuracy against the number of labelled sentences in the language."""
    rows = [row for row in found["evaluation"] if row["metric"].startswith("few_shot_")]
    panels = list(dict.fromkeys((row["task"], row["language"]) for row in rows if row["language"] != recipe.data.source_language))
    if not panels:
        return None
    figure, axes = _grid(len(panels), 2.7)
    for axis, (task, lang) in zip(axes, panels, strict=True):
        for model, colour in COLOURS.items():
            here = [row for row in rows if (row["task"], row["language"], row["model"]) == (task, lang, model)]
            sizes = [int(row["metric"].split("_")[2]) for row in here]
            axis.plot(sizes, [100 * row["value"] for row in here], "o-", color=colour, label=LABELS[model])
            axis.fill_between(sizes, [100 * row["low"] for row in here], [100 * row["high"] for row in here], color=colour, alpha=0.15)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_title(f"{task}, {lang}")
        axis.set_xlabel("labelled sentences")
    return _labelled(figure, axes, "accuracy × 100")


def _curves(recipe: Recipe, found: dict[str, Any]) -> Figure | None:
    """Loss, collapse measures, held-out scores and rate over the steps."""
    curves = found["curves"]
    if not curves.get("train/loss"):
        return None
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 5.6), layout="constrained")
    _line(axes[0, 0], curves, {"train/loss": "loss", "train/cosine": "cosine distance to the teacher"}, smooth=SMOOTH)
    axes[0, 0].set_title("Training loss")
    held_out = {name: name.removeprefix("held_out/") for name in curves if name.startswith("held_out/")}
    _line(axes[0, 1], curves, held_out, marker="o")
    axes[0, 1].set_title("Accuracy on held-out text")
    _line(axes[1, 0], curves, {"train/student_rank": "effective rank of the student's batch"}, smooth=SMOOTH)
    axes[1, 0].set_title("Spread of the student's vectors")
    _line(axes[1, 1], curves, {"train/sequences_per_second": "texts per second"}, smooth=SMOOTH)
    axes[1, 1].set_title("Speed")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
    return figure


def _line(axis: Any, curves: dict[str, Any], names: dict[str, str], smooth: int = 0, marker: str = "") -> None:
    """Curves by name; with `smooth`, the mean of as many last values over the pale single ones."""
    for colour, (name, label) in zip(PALETTE * 3, names.items(), strict=False):
        if curves.get(name):
            steps, values = zip(*curves[name], strict=True)
            if smooth:
                axis.plot(steps, values, color=colour, lw=0.8, alpha=0.35)
                values = tuple(np.mean(values[max(0, end - smooth) : end]) for end in range(1, len(values) + 1))
            axis.plot(steps, values, color=colour, label=label, marker=marker, ms=3, lw=1.5)
    axis.legend(fontsize=8, loc="best" if len(names) < 4 else "center left", bbox_to_anchor=None if len(names) < 4 else (1.0, 0.5))


def _composition(recipe: Recipe, found: dict[str, Any]) -> Figure | None:
    """Pairs by corpus, texts by language, and what of these an epoch of training shows."""
    corpora, plan = found["prepared"]["corpora"], found["plan"]
    panels = {"Pairs by corpus": corpora, "Texts by language": plan["languages"], "Texts seen per epoch": plan["seen"]}
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 0.9 + 0.32 * max(3, len(corpora), len(plan["languages"]))), layout="constrained")
    for axis, (title, counts) in zip(axes, panels.items(), strict=True):
        names = sorted(counts, key=lambda name: counts[name])
        bars = axis.barh(names, [counts[name] for name in names], color=PALETTE[0])
        axis.bar_label(bars, [f"{counts[name]:,.0f}" for name in names], padding=3, fontsize=8)
        axis.margins(x=0.3)
        axis.grid(axis="y", visible=False)
        axis.set_title(title)
    return figure


def _rejects(recipe: Recipe, found: dict[str, Any]) -> Figure | None:
    """Rejected rows by reason and corpus."""
    by_corpus = found["prepared"]["rejected_by_corpus"]
    reasons = list(found["prepared"]["rejected"])[::-1]
    if not reasons:
        return None
    figure, axis = pyplot.subplots(figsize=(10, 1.2 + 0.3 * len(reasons)), layout="constrained")
    left = np.zeros(len(reasons))
    for colour, (name, counts) in zip(PALETTE * 3, by_corpus.items(), strict=False):
        values = np.array([counts.get(reason, 0) for reason in reasons])
        if values.any():
            axis.barh([reason.replace("_", " ") for reason in reasons], values, left=left, color=colour, label=name)
            left += values
    axis.grid(axis="y", visible=False)
    axis.set_title("Rejected rows by reason")
    axis.legend(fontsize=8)
    return figure


def _lengths(recipe: Recipe, found: dict[str, Any]) -> Figure | None:
    """Text lengths of the corpus by language, and of the tasks: a student learns the lengths that it is shown."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained", sharex=True)
    for axis, histograms, title in (
        (axes[0], found["plan"]["token_lengths"], "Corpus: tokens per text"),
        (axes[1], found["task_lengths"], "Tasks: tokens per text"),
    ):
        for colour, (name, counts) in zip(PALETTE * 3, histograms.items(), strict=False):
            share = np.array(counts) / max(1, sum(counts))
            axis.plot(np.arange(len(share)), 100 * np.cumsum(share), color=colour, label=name)
        axis.set_title(title)
        axis.set_xlabel("tokens (at most)")
        axis.set_xlim(0, recipe.student.max_length)
        if histograms:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("share of texts, %")
    return figure


def _projection(recipe: Recipe, found: dict[str, Any]) -> Figure | None:
    """Translations of a few held-out sentences: one colour a sentence, one sign a language."""
    rows = found["projection"]
    if not rows:
        return None
    figure, axis = pyplot.subplots(figsize=(10, 5.2), layout="constrained")
    signs = dict(zip([recipe.data.source_language, *recipe.data.languages], "*os^Dv<>ph" * 3, strict=False))
    for row in rows:
        colour = PALETTE[row["group"] % len(PALETTE)]
        size = 150 if row["language"] == recipe.data.source_language else 50
        axis.scatter(row["x"], row["y"], marker=signs[row["language"]], color=colour, s=size, alpha=0.85)
    heights = [row["y"] for row in rows]
    height, apart = -np.inf, 0.045 * (max(heights) - min(heights))
    for row in sorted((row for row in rows if row["language"] == recipe.data.source_language), key=lambda row: row["y"]):
        height = max(row["y"] + apart / 2, height + apart)  # of labels side by side, one moves up
        short = row["text"] if len(row["text"]) < 60 else row["text"][:57] + "…"
        axis.annotate(
            short, (row["x"], height), xytext=(7, 0), textcoords="offset points", fontsize=8, color=PALETTE[row["group"] % len(PALETTE)]
        )
    for lang, sign in signs.items():
        axis.scatter([], [], marker=sign, color="#444", label=lang)
    axis.legend(ncols=len(signs))
    axis.margins(0.12)
    axis.set_title("Held-out sentences and their translations in the student's space (first two principal axes)")
    axis.set_xticks([])
    axis.set_yticks([])
    return figure


def _keys(space: Space, rows: list[dict[str, Any]]) -> Figure | None:
    """The metric against each searched key: full circles for trials that ran to the end, empty ones for those stopped early."""
    from xdist.findings import keys, numbers
    from xdist.trials import shown

    rows, names = [row for row in rows if row["value"] is not None], keys(rows)
    if not rows or not names:
        return None
    figure, axes = _grid(len(names), 3.0)
    for axis, name in zip(axes, names, strict=True):
        numeric = numbers(rows, name)
        here = [(row, row["settings"][name]) for row in rows if name in row["settings"]]
        labels = sorted({shown(value) for _, value in here})
        for row, value in here:
            place = value if numeric else labels.index(shown(value))
            done = row["outcome"] == "finished"
            axis.plot(place, row["value"], "o", color=PALETTE[0], mfc=PALETTE[0] if done else "white", ms=6)
        if not numeric:
            axis.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize=8)
            axis.margins(x=0.2)
        elif here and 0 < 10 * min(value for _, value in here) <= max(value for _, value in here):
            axis.set_xscale("log")
        axis.set_title(name)
    axes[0].set_ylabel(space.metric)
    return figure


def _trials(space: Space, rows: list[dict[str, Any]]) -> Figure | None:
    """The metric of each trial over its steps, the best trials in colour."""
    from xdist.trials import label

    if not any(row["curve"] for row in rows):
        return None
    figure, axis = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    for rank, row in reversed(list(enumerate(rows))):
        if row["curve"]:
            steps, values = zip(*row["curve"], strict=True)
            first = rank < 5
            colour, name = (PALETTE[rank], label(row["trial"], row["settings"])) if first else ("#c4ccd4", None)
            axis.plot(steps, values, "o-", color=colour, label=name, ms=3, lw=1.8 if first else 1)
    axis.set_xlabel("step")
    axis.set_ylabel(space.metric)
    axis.set_title("Trials; the best five in colour")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=8)
    return figure


def _study(recipe: Recipe, measure: str, entries: list[dict[str, Any]]) -> Figure | None:
    """Score against labelled sentences for each task and language: a line a method, with its band; what needs no labels lies across."""
    from xdist.study import METHODS, TUNED
    from xdist.study_report import in_words

    panels = list(dict.fromkeys((entry["task"], entry["language"]) for entry in entries))
    figure, axes = _grid(len(panels), 2.9)
    more = iter(PALETTE[1:] * 3)
    methods = dict.fromkeys(entry["method"].removesuffix(TUNED) for entry in entries)
    colours = {method: COLOURS[METHODS[method]] if method in METHODS else next(more) for method in methods}
    for axis, (task, lang) in zip(axes, panels, strict=True):
        here = [entry for entry in entries if (entry["task"], entry["language"]) == (task, lang)]
        for entry in here:
            colour, points = colours[entry["method"].removesuffix(TUNED)], entry["points"]
            axis.plot(
                [p["size"] for p in points],
                [100 * p["mean"] for p in points],
                "s--" if entry["method"].endswith(TUNED) else "o-",
                color=colour,
                ms=3.5,
                label=in_words(entry["method"]),
            )
            axis.fill_between(
                [p["size"] for p in points],
                [100 * p["low"] for p in points],
                [100 * p["high"] for p in points],
                color=colour,
                alpha=0.15,
                lw=0,
            )
        goals = here[0]["goals"]
        if "student_zero_shot" in goals:
            axis.axhline(100 * goals["student_zero_shot"], color=COLOURS["after"], lw=1.2, ls=":", label="student without labels")
        axis.axhline(100 * goals["teacher_on_source"], color="#444", lw=1, ls="--", label=f"teacher on {recipe.data.source_language}")
        sizes = sorted({p["size"] for entry in here for p in entry["points"]})
        axis.set_xscale("log", base=2)
        ticks = [size for size, following in zip(sizes, [*sizes[1:], math.inf], strict=True) if following > 1.2 * size]
        axis.set_xticks(ticks, [f"{size:,}" for size in ticks], rotation=45, fontsize=8)
        axis.minorticks_off()
        axis.set_title(f"{task}, {lang}")
    for axis in axes[-min(3, len(axes)) :]:
        axis.set_xlabel("labelled sentences")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(max(low, 0), min(high, 103))  # bands of two samples reach far beyond what a score can be
    axes[0].set_ylabel(f"{'accuracy' if measure == 'accuracy' else 'macro-F1'} × 100")
    handles = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3)
    return figure
