"""The fine-tuned teacher: its losses by hand, its learning, and the second stage end to end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentences
from sentence_transformers import SentenceTransformer
from sklearn.metrics import accuracy_score
from torch.nn.functional import normalize

from xdist import encoder, files, finetune, metrics, pipeline, recipes, study
from xdist.config import Finetune, Recipe
from xdist.errors import Refused

MakeRecipe = Callable[..., Recipe]


def test_contrastive_loss_by_hand() -> None:
    vectors = normalize(torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    labels = torch.tensor([0, 0, 1, 1, 2])  # the last has nothing to be near to
    cosines = (vectors @ vectors.T / finetune.TEMPERATURE).numpy()
    wanted = []
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        rest = [column for column in range(5) if column != row]
        wanted.append(-(cosines[row, other] - np.log(np.exp(cosines[row, rest]).sum())))
    assert finetune.contrastive(vectors, labels).item() == pytest.approx(np.mean(wanted))
    assert finetune.contrastive(vectors, torch.arange(5)).item() == 0


def test_every_row_is_seen_once_an_epoch() -> None:
    steps = finetune._batches(23, 5, 3, seed=0)
    assert [len(step) for step in steps] == [5, 5, 5, 4, 4] * 3
    for epoch in range(3):
        assert sorted(np.concatenate(steps[epoch * len(steps) // 3 : (epoch + 1) * len(steps) // 3])) == list(range(23))
    assert not np.array_equal(steps[0], steps[len(steps) // 3])


@pytest.mark.parametrize("method", ["head", "contrastive"])
def test_the_task_is_learnt(teacher: str, method: str) -> None:
    """Whether the word 'heart' is there: on unseen sentences, vectors of one class come nearer to each other than to the other's."""
    settings = Finetune.model_validate({"method": method, "epochs": 12, "lr": 1e-3, "batch_size": 16})
    rows, unseen = sentences(400, seed=5)[:300], sentences(400, seed=5)[300:]
    same = np.equal.outer(*[[row["label"] for row in unseen]] * 2)

    def apart(found: encoder.Encoder) -> float:
        vectors = found.encode([row["en"] for row in unseen])
        cosines = vectors @ vectors.T
        return float(cosines[same].mean() - cosines[~same].mean())

    found = encoder.load(teacher, "float32")
    before = apart(found)
    texts, labels = ([row[column] for row in rows] for column in ("en", "label"))
    seen: list[int] = []
    start = metrics.fit_head(found.encode(texts), labels)
    head = finetune.learn(found, texts, labels, start, settings, seed=0, clip=1.0, longest=32, seen=seen.append)
    assert apart(found) > before + 0.2
    assert not found.training
    assert seen[-1] == 12 * 300
    if method == "head":
        predicted = [head.classes[place] for place in head.predict(found.encode([row["en"] for row in unseen]))]
        assert accuracy_score([row["label"] for row in unseen], predicted) > 0.9


def test_the_second_stage_from_corpus_to_study(make_recipe: MakeRecipe, teacher: str, tmp_path: Path, ray_cluster: None) -> None:
    """A run with a fine-tuned teacher and soft labels, from the student of a plain run; and both in one study."""
    plain = make_recipe()
    pipeline.distill(plain)
    second = make_recipe(
        run={"name": "second"},
        finetune={"task": "topic", "epochs": 4, "lr": 5e-4},
        student={"base": f"{plain.folder}/student", "vocabulary": "keep", "max_length": 32},
        train={"loss": {"cosine": 1, "soft_labels": 0.5}},
    )
    pipeline.distill(second)
    place = finetune.place(second)
    assert place == finetune.place(plain.model_copy(update={"finetune": second.finetune}))  # one for all runs that ask for the same
    assert place != finetune.place(second.model_copy(update={"finetune": second.finetune.model_copy(update={"epochs": 5})}))
    tuned = SentenceTransformer(place, device="cpu")
    texts = [row["en"] for row in sentences(20)]
    cosine = (tuned.encode(texts) * SentenceTransformer(teacher, device="cpu").encode(texts)).sum(1)
    assert cosine.max() < 0.9999  # it has moved
    assert len(list(Path(second.run.storage, "store").iterdir())) == 2  # another teacher, another fingerprint
    assert files.read_json(f"{second.folder}/embed.json")["embedded"] == 400
    start, plain_student = (SentenceTransformer(f, device="cpu") for f in (f"{second.folder}/initial", f"{plain.folder}/student"))
    np.testing.assert_allclose(start.encode(texts), plain_student.encode(texts), atol=1e-5)

    weights = Path(place, "model.safetensors")
    made = weights.stat().st_mtime_ns
    finetune.finetune(second)
    assert weights.stat().st_mtime_ns == made  # done once

    path = tmp_path / "few.yaml"
    path.write_text("study: {sizes: [8, 16, 30], seeds: 2, c: [10], methods: [student], task_runs: {topic: second}}")
    pipeline.tune(plain, str(path))
    zero = {
        (row["method"], row["language"]): row["accuracy"]
        for lang in ("es", "de")
        for method in ("student", "task")
        for row in files.read_json(f"{plain.folder}-few/units/topic-{lang}-{method}.json")
        if row["size"] == 0
    }
    for run, method in ((plain, "student"), (second, "task")):
        evaluation = files.read_json(f"{run.folder}/evaluation.json")
        for lang in ("es", "de"):
            (row,) = [r for r in evaluation if (r["language"], r["model"], r["metric"]) == (lang, "after", "zero_shot_accuracy")]
            assert zero[method, lang] == pytest.approx(row["value"], abs=0.051)  # the same head on the same vectors, to 2 of 40


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"finetune": {"task": "topik"}}, "no classification task 'topik'; did you mean topic"),
        ({"finetune": {"task": "translation"}}, "no classification task 'translation'"),
        ({"train": {"loss": {"soft_labels": 1}}}, "soft_labels needs finetune.task"),
    ],
)
def test_contradictions_are_refused(make_recipe: MakeRecipe, sections: dict[str, Any], message: str) -> None:
    settings = make_recipe().model_dump()
    for name, keys in sections.items():
        settings[name] |= keys
    with pytest.raises(Refused, match=message):
        recipes.check(settings, "recipe")


def test_a_run_that_did_not_fine_tune_is_no_task_run(make_recipe: MakeRecipe, teacher: str) -> None:
    recipe = make_recipe()
    with pytest.raises(Refused, match="topic: nothing is no finished run"):
        study.load("few.yaml", {"study": {"task_runs": {"topic": "nothing"}}}, recipe)
    files.upload(teacher, f"{recipe.folder}/student")
    pipeline.settle(recipe)
    with pytest.raises(Refused, match=r"run tiny fine-tuned its teacher on nothing; set finetune\.task there"):
        study.load("few.yaml", {"study": {"task_runs": {"topic": "tiny"}}}, recipe)
