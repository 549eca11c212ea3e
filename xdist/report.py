"""Report: what the student can do in every language, what went in, and how training went.

Reads the run's folder and its MLflow curves; writes report.json, report.html (self-contained), plots/ and the model card
in the student's folder.
"""

import collections
import os
import tempfile
from typing import Any

import numpy as np

from xdist import files, plots, shards, track
from xdist.config import Recipe
from xdist.evaluate import BASELINE

Row = dict[str, Any]
NAMES = {"teacher": "teacher", "before": "student before", "after": "student after"}
COLUMNS = NAMES | {BASELINE: "character TF-IDF"}
CURVES = ("train/loss", "train/cosine", "train/student_cosine", "train/student_rank", "train/sequences_per_second", "held_out/selection")


def headline(rows: list[Row]) -> list[Row]:
    """The measure that stands for each task: zero-shot accuracy, retrieval from the source language, Spearman."""
    return [row for row in rows if row["metric"] in ("zero_shot_accuracy", "spearman") or row["metric"].endswith("_to_xx")]


def as_metrics(rows: list[Row]) -> dict[str, float]:
    """Rows as MLflow metrics: eval/<task>/<language>/<metric>, with /teacher or /before behind for those models."""
    return {
        f"eval/{row['task']}/{row['language']}/{row['metric']}" + ("" if row["model"] == "after" else f"/{row['model']}"): row["value"]
        for row in rows
    }


def table(recipe: Recipe, rows: list[Row]) -> str:
    """The results as text: per task and language the teacher, the student before and after."""
    if not rows:
        return "\nNo evaluation task is declared (evaluate.tasks), so there are no results to show.\n"
    source = recipe.data.source_language
    cells = {(row["task"], row["metric"], row["language"], row["model"]): row for row in headline(rows)}
    lines = ["", f"{'task':<24} {'language':<9} {'teacher':>8} {'before':>8} {'after':>8}   {'95 % interval':<15} of teacher on {source}"]
    for task, metric, lang in dict.fromkeys((t, m, lang) for t, m, lang, _ in cells):
        found = {model: cells.get((task, metric, lang, model)) for model in NAMES}
        values = [f"{100 * row['value']:8.1f}" if row else f"{'':>8}" for row in found.values()]
        after, english = found["after"], cells.get((task, metric, source, "teacher"))
        interval = f"{100 * after['low']:.1f} to {100 * after['high']:.1f}" if after else ""
        share = f"{after['value'] / english['value']:.0%}" if after and english and english["value"] else ""
        lines.append(f"{task:<24} {lang:<9} {' '.join(values)}   {interval:<15} {share}")
    lines.append("  accuracy zero-shot (head fitted on the teacher's vectors of the source language), retrieval, or Spearman; × 100")
    return "\n".join(lines) + "\n"


def write(recipe: Recipe, run_id: str) -> dict[str, Any]:
    """Write all of it; gives what it shows."""
    found = gather(recipe, run_id)
    files.write_json(f"{recipe.folder}/report.json", found)
    pictures = plots.draw(recipe, found)
    plots.write(recipe.folder, pictures)
    files.write(f"{recipe.folder}/report.html", html(recipe, found, pictures).encode())
    files.write(f"{recipe.folder}/student/README.md", model_card(recipe, found).encode())
    return found


def gather(recipe: Recipe, run_id: str) -> dict[str, Any]:
    """Everything that the report shows, as JSON."""
    folder = recipe.folder
    names = [name for name in track.metric_names(recipe, run_id) if name in CURVES or name.startswith("held_out/")]
    with tempfile.TemporaryDirectory() as scratch:
        student = _student(recipe, scratch)
    return {
        "name": recipe.run.name,
        "prepared": files.read_json(f"{folder}/corpus/manifest.json"),
        "plan": files.read_json(f"{folder}/plan.json"),
        "embed": files.read_json(f"{folder}/embed.json"),
        "evaluation": files.read_json(f"{folder}/evaluation.json"),
        "curves": track.curves(recipe, run_id, names),
        "task_lengths": _task_lengths(recipe, student),
        "projection": _projection(recipe, student),
    }


def _student(recipe: Recipe, scratch: str) -> Any:
    from xdist import encoder

    folder = files.download(f"{recipe.folder}/student", os.path.join(scratch, "student"))
    return encoder.load(folder, "float32", "auto", recipe.teacher.trust_remote_code)


def _task_lengths(recipe: Recipe, student: Any) -> dict[str, list[int]]:
    """Histogram of token counts of each task's test texts, all languages together."""
    from xdist import tasks

    out = {}
    for task in recipe.evaluate.tasks:
        texts = [text for lang in recipe.task_languages(task) for text in tasks.read(recipe, task, "test", lang)["text"]]
        out[task.name] = np.bincount([len(row) for row in student.tokenize(texts, 512)]).tolist()
    return out


def _projection(recipe: Recipe, student: Any, sentences: int = 8) -> list[Row]:
    """A few held-out sentences in all their languages on the two first principal axes of the student's vectors."""
    wanted = set(recipe.data.languages)
    groups = [group for group in shards.holdout(recipe.folder) if wanted <= set(group["languages"])]
    groups = sorted(groups, key=lambda group: -len(group["source"]))[: 10 * sentences : 10] or shards.holdout(recipe.folder)[:sentences]
    rows = []
    for number, group in enumerate(groups):
        texts = {recipe.data.source_language: group["source"], **dict(zip(group["languages"], group["texts"], strict=True))}
        rows += [{"group": number, "language": lang, "text": text} for lang, text in texts.items()]
    if len(rows) < 3:
        return []
    vectors = student.encode([row["text"] for row in rows])
    centred = vectors - vectors.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    return [row | {"x": float(x), "y": float(y)} for row, (x, y) in zip(rows, centred @ axes.T, strict=True)]


def html(recipe: Recipe, found: dict[str, Any], pictures: dict[str, Any]) -> str:
    """The report as one page: text is escaped, pictures are inside."""
    cells: dict[tuple[str, str, str], dict[str, Row]] = collections.defaultdict(dict)
    for row in found["evaluation"]:
        cells[(row["task"], row["metric"], row["language"])][row["model"]] = row
    return plots.page(
        "report.html.jinja", pictures, recipe=recipe, found=found, cells=cells, names=COLUMNS, source=recipe.data.source_language
    )


def model_card(recipe: Recipe, found: dict[str, Any]) -> str:
    """The student's README: what it is, how to use it, what it can do, what it was made from."""
    languages = [recipe.data.source_language, *recipe.data.languages]
    lines = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity", "tags: [distillation, multilingual]"]
    lines += ["language:", *(f"- {lang}" for lang in languages), "---", "", f"# {recipe.run.name}", ""]
    lines += [
        f"A multilingual sentence encoder ({', '.join(languages)}), distilled from `{recipe.teacher.model}` on "
        f"{found['prepared']['pairs']:,} translation pairs with xdist. It gives unit vectors in the teacher's space, so a classifier "
        "fitted on the teacher's vectors works on this model's vectors in every language.",
        "", "```python", "from sentence_transformers import SentenceTransformer", "",
        'student = SentenceTransformer("path/to/this/folder")', 'vectors = student.encode(["The patient has pneumonia."])', "```", "",
        "## Results", "",
        "| task | language | measure | teacher | student before | student after | 95 % interval |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    cells: dict[tuple[str, str, str], dict[str, Row]] = collections.defaultdict(dict)
    for row in headline(found["evaluation"]):
        cells[(row["task"], row["language"], row["metric"])][row["model"]] = row
    for (task, lang, metric), models in cells.items():
        values = " | ".join(f"{100 * models[model]['value']:.1f}" for model in NAMES)
        interval = f"{100 * models['after']['low']:.1f} to {100 * models['after']['high']:.1f}"
        lines.append(f"| {task} | {lang} | {metric} | {values} | {interval} |")
    lines += ["", "## Training text", "", "| corpus | pairs |", "|---|---|"]
    lines += [f"| {name} | {count:,} |" for name, count in found["prepared"]["corpora"].items()]
    kept = "were kept out of training" if recipe.evaluate.decontaminate else "were not looked for in the training text"
    lines += ["", f"Texts of the evaluation sets above {kept}.", ""]
    return "\n".join(lines)
