"""What a low-resource study found: as text, CSV, pictures and a page. Reads the fits of `fits.run` and its summary."""

import csv
import io
import math
from typing import Any

from xdist import files
from xdist.config import Recipe
from xdist.study import TUNED, Row, Study, summary

LABELS = {
    "student": "distilled student", "before": "student before distillation", "teacher": "teacher, fed the language",
    "tfidf": "character TF-IDF", "task": "student of the fine-tuned teacher",
}  # fmt: skip
GOALS = {"student_zero_shot": "the student without any label", "teacher_on_source": "the teacher on {source}"}


def in_words(method: str) -> str:
    """A method in words."""
    base = method.removesuffix(TUNED)
    return LABELS.get(base, base) + (", fine-tuned" if method != base else "")


def write(recipe: Recipe, study: Study, folder: str, rows: list[Row]) -> dict[str, list[Row]]:
    """Write results.csv, summary.json, plots/ and report.html; gives the summary by measure."""
    from xdist import plots

    found = {measure: summary(recipe, rows, measure) for measure in ("accuracy", "macro_f1")}
    files.write(f"{folder}/results.csv", as_csv(rows).encode())
    files.write_json(f"{folder}/summary.json", _finite(found))
    pictures = {name: picture for measure in found for name, picture in plots.draw_study(recipe, measure, found[measure]).items()}
    plots.write(folder, pictures)
    page = html(recipe, study, found, pictures)
    files.write(f"{folder}/report.html", page.encode())
    return found


def _finite(value: Any) -> Any:
    """JSON has no infinity: a number of labels that is never reached is null."""
    if isinstance(value, dict):
        return {key: _finite(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inside) for inside in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def as_csv(rows: list[Row]) -> str:
    """One line a fit."""
    columns = ["task", "language", "method", "size", "seed", "c", "lr", "chosen", "accuracy", "macro_f1", "dev"]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def sizes(entries: list[Row]) -> list[int]:
    """The sample sizes that some method was measured at."""
    return sorted({point["size"] for entry in entries for point in entry["points"]})


def table(entries: list[Row]) -> str:
    """Accuracy × 100 by number of labelled sentences, and what distillation saves, as text."""
    lines = []
    for task in dict.fromkeys(entry["task"] for entry in entries):
        here = [entry for entry in entries if entry["task"] == task]
        columns = sizes(here)
        lines += ["", f"{task:<24} {'labelled sentences:':>28} " + " ".join(f"{size:>6,}" for size in [0, *columns])]
        for lang in dict.fromkeys(entry["language"] for entry in here):
            mine = [entry for entry in here if entry["language"] == lang]
            for entry in mine:
                values = {0: entry["zero_shot"]} | {point["size"]: point["mean"] for point in entry["points"]}
                cells = [f"{100 * values[size]:6.1f}" if values.get(size) is not None else f"{'':>6}" for size in [0, *columns]]
                lines.append(f"  {lang:<4} {in_words(entry['method']):<46} " + " ".join(cells))
            lines += [f"       {text}" for text in saved(mine)]
    return "\n".join([*lines, ""])


def saved(entries: list[Row]) -> list[str]:
    """What distillation saves in one task and language, in sentences."""
    by_method = {entry["method"]: entry for entry in entries}
    before = by_method.get("before")
    if not before or "student_zero_shot" not in before["goals"]:
        return []
    goal, reached = before["goals"]["student_zero_shot"], before["measured"]["student_zero_shot"]
    most = before["points"][-1]["size"] if before["points"] else 0
    if reached is None:
        text = f"the undistilled student does not reach the distilled one's {100 * goal:.1f} without labels, even with {most:,}"
    else:
        text = f"the undistilled student needs {reached:,} labels to reach the distilled one's {100 * goal:.1f} without any"
    fitted = before.get("labels", {}).get("student_zero_shot")
    return [text + (f" (fitted: {labels(fitted)})" if fitted else "")]


def labels(found: tuple[float, float, float]) -> str:
    """A number of labels with its interval; the fit says nothing beyond twice the sizes that were measured."""
    if math.isinf(found[1]):
        return "out of reach"
    middle, low, high = (f"{value:,.0f}" if math.isfinite(value) else "out of reach" for value in found)
    return f"{middle}, 95 % interval {low} to {high}"


def points(found: dict[str, list[Row]], unit: Row) -> list[tuple[str, int, float]]:
    """A unit's (metric, step, mean) for MLflow; the step is the number of labels."""
    out = []
    for measure, entries in found.items():
        entry = next(entry for entry in entries if all(entry[key] == value for key, value in unit.items()))
        zero = [] if entry["zero_shot"] is None else [(0, entry["zero_shot"])]
        out += [(f"study/{measure}", size, value) for size, value in zero + [(p["size"], p["mean"]) for p in entry["points"]]]
    return out + [(f"study/{name}", p["size"], value) for p in entry["points"] for name, value in p["searched"].items()]


def html(recipe: Recipe, study: Study, found: dict[str, list[Row]], pictures: dict[str, Any]) -> str:
    """The study as one page: text is escaped, pictures are inside."""
    from xdist import plots

    return plots.page("study.html.jinja", pictures, 
        recipe=recipe, study=study, found=found, in_words=in_words, tuned=TUNED, sizes=sizes, saved=saved, labels=labels,
        goals={name: text.format(source=recipe.data.source_language) for name, text in GOALS.items()},
    )  # fmt: skip


def next_steps(folder: str, tracking: str) -> dict[str, str]:
    """What to do with it."""
    return {
        "look at the report": f"{folder}/report.html",
        "every fit": f"{folder}/results.csv",
        "compare in MLflow": tracking,
    }
