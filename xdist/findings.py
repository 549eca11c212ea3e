"""Findings of a search: as text, CSV, pictures and a page, and the best settings as a recipe.

Reads the rows that `tune.run` gives, best first; writes trials.csv, best.yaml, plots/ and report.html in the search's folder.
"""

import csv
import io
from typing import Any

from xdist import files, recipes, spaces
from xdist.config import Recipe
from xdist.spaces import Space
from xdist.trials import Row, shown

MOST_LINES = 20  # of the table on the terminal
LENGTH = ("train.steps", "train.epochs", "train.evaluate_every", "train.checkpoint_every", "train.log_every")


def write(recipe: Recipe, search: Recipe, space: Space, rows: list[Row]) -> None:
    """Write all of it. `recipe` is the one that was varied, `search` the search's own."""
    from xdist import plots

    files.write(f"{search.folder}/trials.csv", as_csv(space, rows).encode())
    files.write(f"{search.folder}/best.yaml", best(recipe, search, space, rows).encode())
    pictures = plots.draw_search(space, rows)
    plots.write(search.folder, pictures)
    files.write(f"{search.folder}/report.html", html(search, space, rows, pictures).encode())


def best(recipe: Recipe, search: Recipe, space: Space, rows: list[Row]) -> str:
    """The recipe with the best trial's settings, as YAML. What the space fixed is in it too, apart from the search's length."""
    settings = space.fixed | {key: value for key, value in rows[0]["settings"].items() if key != "run.seed"}
    searched = [key for key in settings if key in space.search or key not in LENGTH]
    found = recipes.applied(recipe, {key: settings[key] for key in searched})
    found = found.model_copy(update={"run": found.run.model_copy(update={"name": f"{search.run.name}-best"})})
    return spaces.written(found, f"Best of {len(rows)} trials of search {search.run.name}: {space.metric} {rows[0]['mean']:.4f}")


def keys(rows: list[Row]) -> list[str]:
    """The searched keys, in the order of the space."""
    return list(dict.fromkeys(key for row in rows for key in row["settings"]))


def table(space: Space, rows: list[Row], most: int = MOST_LINES) -> str:
    """The best trials as text: what was searched, how long each was trained, and what it came to."""
    names = keys(rows)
    heads = ["trial", *(name.removeprefix("train.").removeprefix("data.") for name in names), "steps", space.metric, "accuracy", ""]
    lines = [heads] + [_cells(row, names, space) for row in rows[:most]]
    widths = [max(len(line[place]) for line in lines) for place in range(len(heads))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    left_out = [f"… and {len(rows) - most} more in trials.csv"] if len(rows) > most else []
    spent, whole = steps(rows)
    return "\n".join(["", *text, *left_out, "", f"{spent:,} training steps, {spent / max(1, whole):.0%} of all trials in full", ""])


def _cells(row: Row, names: list[str], space: Space) -> list[str]:
    accuracy = row["measures"].get("accuracy")
    return [
        row["trial"],
        *(shown(row["settings"][name]) if name in row["settings"] else "" for name in names),
        f"{row['steps']:,}",
        "" if row["value"] is None else f"{row['value']:.4f}",
        "" if accuracy is None else f"{accuracy:.4f}",
        "" if row["outcome"] == "finished" else row["outcome"] or "unfinished",
    ]


def steps(rows: list[Row]) -> tuple[int, int]:
    """Training steps that all trials took together, and those that they would have taken in full."""
    longest = max((row["of"] for row in rows), default=0)
    return sum(row["steps"] for row in rows), sum(row["of"] or longest for row in rows)


def as_metrics(space: Space, rows: list[Row]) -> dict[str, float]:
    """The search as numbers for MLflow."""
    spent, whole = steps(rows)
    return {f"best/{space.metric}": rows[0]["mean"], "search/trials": len(rows), "search/steps": spent, "search/steps_in_full": whole}


def as_csv(space: Space, rows: list[Row]) -> str:
    """One line a trial, best first: settings, steps, outcome and every measure."""
    names, measures = keys(rows), list(dict.fromkeys(name for row in rows for name in row["measures"]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", *names, "steps", "of", "outcome", "seconds", *measures])
    for row in rows:
        settings = [row["settings"].get(name, "") for name in names]
        writer.writerow([row["trial"], *settings, row["steps"], row["of"], row["outcome"], round(row["seconds"], 1)] + [
            row["measures"].get(name, "") for name in measures
        ])  # fmt: skip
    return out.getvalue()


def html(search: Recipe, space: Space, rows: list[Row], pictures: dict[str, Any]) -> str:
    """The search as one page: text is escaped, pictures are inside."""
    from xdist import plots

    names = keys(rows)
    cells = [_cells(row, names, space) for row in rows]
    return plots.page("search.html.jinja", pictures, search=search, space=space, rows=rows, names=names, cells=cells, steps=steps(rows))


def next_steps(search: Recipe, tracking: str) -> dict[str, str]:
    """What to do with it."""
    return {
        "train with the best": f"python jobs/distill.py {search.folder}/best.yaml",
        "look at the report": f"{search.folder}/report.html",
        "compare the trials": tracking,
    }


def numbers(rows: list[Row], name: str) -> bool:
    """Whether all values of a key are numbers."""
    found = [row["settings"][name] for row in rows if name in row["settings"]]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in found)
