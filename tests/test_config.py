"""Settings: what is refused and how it is told, what the command line overrides, what makes two recipes the same run."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from xdist import config, job, recipes
from xdist.config import Recipe
from xdist.errors import Refused

ROOT = Path(__file__).parent.parent


def recipe(tmp_path: Path, text: str = "run: {name: r}\n") -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def parse(tmp_path: Path, *argv: str, text: str = "run: {name: r}\n") -> Recipe:
    return recipes.parse([recipe(tmp_path, text), *argv], "")[0]


SHARING = "{name: a, path: x, id: id, shares_ids_with: [t]}"
RETRIEVAL = "name: t, kind: retrieval, test: 'x.{lang}.tsv'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rate: 1}", r"train\.learning_rate: unknown key; known|train\.learning_rate: unknown key; did you mean"),
        ("train: {stesp: 5}", r"recipe\.yaml: train\.stesp: unknown key; did you mean train\.steps\?"),
        ("trian: {steps: 5}", r"recipe\.yaml: trian: unknown key; did you mean train\?"),
        ("track: {uri: 'https://me:secret@host/'}", r"track\.uri holds a password.*MLFLOW_TRACKING_PASSWORD"),
        ("run: {storage: 's3://key:secret@bucket/x'}", r"run\.storage holds a password"),
        ("data: {corpora: [{name: a, path: 'ftp://me:secret@host/x'}]}", r"data\.corpora\.a\.path holds a password"),
        ("evaluate: {tasks: [{name: t, kind: sts, test: 'ftp://me:secret@host/{lang}'}]}", r"evaluate\.tasks\.t\.test holds a password"),
        (
            "data: {corpora: [{name: a, path: x, wieght: 2}]}",
            r"data\.corpora\.a\.wieght: unknown key; did you mean data\.corpora\.a\.weight\?",
        ),
        ("data: {corpora: [{name: a, path: x, where: {day: 2024-13-45}}]}", "is not valid YAML"),
        ("_env_file: /etc/passwd", "_env_file: unknown key"),
        ("_cli_parse_args: true", "_cli_parse_args: unknown key"),
        ("1: {}", "1: unknown key"),
        ("train: {steps: many}", r"train\.steps: .*valid integer"),
        ("train: {steps: 0}", r"train\.steps: .*greater than or equal to 1"),
        ("train: {lr: -1}", r"train\.lr: .*greater than 0"),
        ("train: 5", r"train: "),
        ("train: {loss: {cosin: 1}}", r"train\.loss: unknown loss 'cosin'; did you mean cosine\?"),
        ("train: {loss: {mse: 0}}", "all weights are zero"),
        ("train: {loss: {mse: -1}}", "weight of mse is negative"),
        ("data: {shards: 6}", r"data\.shards: must be a power of two.*try 8"),
        ("data: {languages: []}", r"data\.languages: "),
        ("data: {languages: [es, es]}", r"data\.languages: 'es' is listed twice"),
        ("data: {languages: [es, no]}", r"data\.languages\.1: .*truth value: put it in quotes"),
        ("data: {languages: [../../etc]}", r"data\.languages: '\.\./\.\./etc' is no language code"),
        ("data: {languages: [en]}", "'en' is the source language; leave it out"),
        ("data: {min_chars: 9, max_chars: 5}", "min_chars 9 is above data.max_chars 5"),
        ("run: {name: ../up}", r"run\.name: "),
        ("run: {name: /etc}", r"run\.name: "),
        ("run: {name: ..}", r"run\.name: "),
        ("run: {name: ''}", r"run\.name: "),
        ('run: {name: "a\\n"}', r"run\.name: "),
        ("run: {name: store}", r"run\.name: 'store' is the name of something else in run\.storage"),
        ("run: {name: mlflow.db}", r"run\.name: 'mlflow\.db'"),
        ("data: {corpora: [{name: a/b, path: x}]}", r"data\.corpora\.a/b\.name"),
        ("data: {corpora: [{name: a, path: x}, {name: a, path: y}]}", "two corpora are called 'a'"),
        ("data: {corpora: [{name: a}]}", r"data\.corpora\.a\.path: Field required"),
        ("data: {corpora: [{name: a, path: x, shares_ids_with: [t], id: id}]}", r"data\.corpora\.a\.shares_ids_with: no task 't'"),
        ("data: {corpora: [{name: a, path: x, format: moses}]}", "format moses needs target_path"),
        ("data: {corpora: [{name: a, path: x, format: csv, target_path: y}]}", "target_path belongs to format moses"),
        ("evaluate: {tasks: [{name: t, kind: classification, test: x}]}", "classification task 't' needs `train`"),
        ("evaluate: {tasks: [{name: t, kind: sts, test: x}, {name: t, kind: sts, test: y}]}", "two tasks have the same name"),
        ("evaluate: {tasks: [{name: t, kind: sts, test: x, languages: [es]}]}", "add the source language 'en'"),
        ("evaluate: {tasks: [{name: t, kind: retrieval, test: x.tsv}]}", r"evaluate\.tasks\.t: put \{lang\} in its paths or in `text`"),
        (f"data: {{corpora: [{SHARING}]}}\nevaluate: {{tasks: [{{{RETRIEVAL}}}]}}", r"shares_ids_with: task t has no `id`"),
        (
            f"data: {{corpora: [{SHARING}]}}\nevaluate: {{decontaminate: false, tasks: [{{{RETRIEVAL}, id: id}}]}}",
            r"shares_ids_with does nothing without evaluate\.decontaminate",
        ),
        ("evaluate: {tasks: [{name: t, kind: classification, train: x, test: x, shots: [0]}]}", r"shots\.0: .*greater than or equal to 1"),
        ("train: {matryoshka: [-1]}", r"train\.matryoshka\.0: .*greater than or equal to 1"),
        ("cluster: {workers: 0}", r"cluster\.workers: 0 and 0 are not the least and the most of at least one worker"),
        ("cluster: {workers: [3, 2]}", r"cluster\.workers: 3 and 2 are not the least and the most"),
        ("cluster: {workers: [1, 2, 3]}", r"cluster\.workers: expected a number of workers, or \[least, most\]"),
        ("cluster: {workers: many}", r"cluster\.workers: expected a number of workers, or \[least, most\]"),
        ("cluster: {workers: 1.5}", r"cluster\.workers: expected a number of workers, or \[least, most\]"),
        ("cluster: {workers: null}", r"cluster\.workers: expected a number of workers, or \[least, most\]"),
        ("cluster: {workers: true}", r"cluster\.workers: expected a number of workers, or \[least, most\]"),
        ("cluster: {workers: [1.5, 2]}", r"cluster\.workers: expected a number of workers, or \[least, most\]"),
        ("cluster: {workers: []}", r"cluster\.workers: expected a number of workers, or \[least, most\]"),
        ("cluster: {workers: {a: 1}}", r"cluster\.workers: expected a number of workers, or \[least, most\]"),
        ("cluster: {workers: [1, 2]}", r"micro_batches 1 is not a multiple of cluster\.workers 2.*set train\.micro_batches: 2"),
        ("cluster: {workers: 2}", r"micro_batches 1 is not a multiple of cluster\.workers 2.*set train\.micro_batches: 2"),
        ("student: {base: other, vocabulary: train}", r"needs student\.base: teacher"),
        ("[1, 2]", "expected keys with values, as in recipes/, found list"),
        ("[]", "found list"),
        ("just text", "found str"),
        ("false", "found bool"),
        ("train: {lr: 1}\ntrain: {steps: 5}", "is not valid YAML: the key 'train' is written twice"),
        ("a: [", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
    ],
)
def test_what_a_recipe_must_not_say(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        parse(tmp_path, text=text)


def test_missing_unreadable_and_empty_recipes(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"none\.yaml does not exist; recipes/ holds examples"):
        recipes.load(tmp_path / "none.yaml")
    with pytest.raises(Refused, match="cannot be read"):
        recipes.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xff}")
    with pytest.raises(Refused, match="is not valid YAML"):
        recipes.load(tmp_path / "latin.yaml")
    assert parse(tmp_path, text="").run.name == "run"


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        parse(tmp_path, text="train: {steps: 0, lr: x}\ndata: {windw: 1}")
    assert len(str(refused.value).splitlines()) == 3


def test_merge_keys_of_yaml_still_work(tmp_path: Path) -> None:
    found = parse(tmp_path, text="data:\n  corpora:\n  - &a {name: a, path: x, weight: 2}\n  - {<<: *a, name: b}\n")
    assert [(corpus.name, corpus.weight) for corpus in found.data.corpora] == [("a", 2), ("b", 2)]


@pytest.mark.parametrize(
    ("argv", "key", "expected"),
    [
        (["--train.lr", "3e-4"], "train.lr", 3e-4),
        (["--run.name=other"], "run.name", "other"),
        (["--train.steps", "5"], "train.steps", 5),
        (["--data.languages", "es,de"], "data.languages", ["es", "de"]),
        (["--data.languages", '["fr"]'], "data.languages", ["fr"]),
        (["--data.languages", "es", "--data.languages", "de"], "data.languages", ["es", "de"]),
        (["--student.layers", "[0, 2]"], "student.layers", [0, 2]),
        (["--train.loss", '{"mse": 1}'], "train.loss", {"mse": 1.0}),
        (["--train.loss", "mse=1,cosine=2"], "train.loss", {"mse": 1.0, "cosine": 2.0}),
        (["--evaluate.decontaminate", "false"], "evaluate.decontaminate", False),
        (["--data.corpora", '[{"name": "z", "path": "p"}]'], "data.corpora.z.path", "p"),
    ],
)
def test_the_command_line_overrides_by_dotted_name(tmp_path: Path, argv: list[str], key: str, expected: Any) -> None:
    text = "run: {name: r}\ntrain: {loss: {similarity: 3}, warmup_steps: 7}\ndata: {languages: [it]}"
    found = parse(tmp_path, *argv, text=text)
    settings = found.model_dump()
    value = settings[key.split(".")[0]][key.split(".")[1]] if key != "data.corpora.z.path" else dict(recipes.flatten(settings))[key]
    assert value == expected
    assert found.train.warmup_steps == 7


ENTRIES = """
data: {corpora: [{name: a, path: x, weight: 1, where: &w {kind: case}}, {name: a.b, path: y, where: *w}]}
evaluate: {tasks: [{name: t, kind: sts, test: 'z.{lang}'}]}
train: {loss: {similarity: 3}}
"""


@pytest.mark.parametrize(
    ("argv", "key", "expected"),
    [
        (["--train.loss.mse", "2e-1"], "train.loss", {"similarity": 3, "mse": 0.2}),
        (["--train.loss.mse=2", "--train.loss", "cosine=1"], "train.loss", {"cosine": 1, "mse": 2}),
        (["--data.corpora.a.b.weight", "5", "--data.corpora.a.weight", "6", "--data.corpora.a.weight", "7"], "weight", [7, 5]),
        (["--data.corpora.a.path", "{recipe}/p=q-{lang}.tsv"], "path", ["HERE/p=q-{lang}.tsv", "y"]),
        (["--data.corpora.a.target", "2024"], "target", ["2024", "target"]),
        (["--data.corpora.a.target=--x"], "target", ["--x", "target"]),
        (["--data.corpora.a.languages", "es, de"], "languages", [["es", "de"], None]),
        (["--data.corpora.a.languages", "[es]", "--data.corpora.a.b.languages", "fr"], "languages", [["es"], ["fr"]]),
        (["--data.corpora.a.max_rows", "5", "--data.corpora.a.max_rows", "None"], "max_rows", [None, None]),
        (["--data.corpora.a.path", "[0-9]*.tsv"], "path", ["[0-9]*.tsv", "y"]),
        (["--data.corpora.a.where.split", "[dev, train]"], "where", [{"kind": "case", "split": ["dev", "train"]}, {"kind": "case"}]),
        (["--data.corpora.a.where.year", "2024"], "where", [{"kind": "case", "year": "2024"}, {"kind": "case"}]),
        (["--data.corpora.a.where", "{split: dev}"], "where", [{"split": "dev"}, {"kind": "case"}]),
        (["--data.corpora.a.codes.es", "es-MX"], "codes", [{"es": "es-MX"}, {}]),
        (["--evaluate.tasks.t.shots", "8,32"], "evaluate.tasks", [("t", [8, 32])]),
    ],
)
def test_named_entries_are_overridden_by_their_name(tmp_path: Path, argv: list[str], key: str, expected: Any) -> None:
    """Before the recipe or behind it; the entries beside it stay."""
    file = recipe(tmp_path, ENTRIES)
    for arguments in ([*argv, file], [file, *argv]):
        found, _ = recipes.parse(arguments, "")
        value: Any = [getattr(corpus, key, None) for corpus in found.data.corpora]
        if key == "train.loss":
            value = found.train.loss
        elif key == "evaluate.tasks":
            value = [(task.name, task.shots) for task in found.evaluate.tasks]
        assert value == ([text.replace("HERE", str(tmp_path)) for text in expected] if key == "path" else expected)


def test_an_override_by_name_may_mend_the_recipe(tmp_path: Path) -> None:
    found = parse(tmp_path, "--data.corpora.a.path", "x", "--train.loss.mse", "1", text="data: {corpora: [{name: a}]}")
    assert found.data.corpora[0].path == "x"
    assert found.train.loss == Recipe().train.loss | {"mse": 1}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.loss.mes", "1"], r"train\.loss: unknown loss 'mes'; did you mean mse"),
        (["--train.loss.mse", "much"], r"train\.loss\.mse: Input should be a valid number"),
        (["--train.loss.mse"], r"command line: train\.loss\.mse needs a value"),
        (["--train.loss.mse="], r"command line: train\.loss\.mse needs a value"),
        (["--data.corpora.a.max_rows", "--plan"], r"command line: data\.corpora\.a\.max_rows needs a value"),
        (["--data.corpora.a.languages", "[es"], r"command line: data\.corpora\.a\.languages: '\[es' is not valid YAML; lists are a,b"),
        (["--data.corpora.c.weight", "1"], r"command line: data\.corpora\.c\.weight: no such entry; there are a, a\.b$"),
        (["--evaluate.tasks.t", "1"], r"command line: evaluate\.tasks\.t: name one of its keys"),
        (["--data.corpora.a.b.wieght", "1"], r"data\.corpora\.a\.b\.wieght: unknown key; did you mean data\.corpora\.a\.b\.weight\?"),
        (["--data.corpora.a.weight", "-1"], r"data\.corpora\.a\.weight: Input should be greater than 0"),
        (["--data.corpora.a.weight.x", "1"], r"command line: data\.corpora\.a\.weight\.x: weight has no keys of its own"),
    ],
)
def test_overrides_by_name_that_make_no_sense_are_refused(tmp_path: Path, argv: list[str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        recipes.parse([recipe(tmp_path, ENTRIES), *argv], "", {"plan": "stop"})


def test_a_recipe_without_entries_has_none_to_override(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"data\.corpora\.a\.weight: no such entry; there are none"):
        parse(tmp_path, "--data.corpora.a.weight", "1")


def test_help_tells_every_key_of_a_corpus_and_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipes.parse(["--help"], "")
    told = capsys.readouterr().out
    assert {f"  --data.corpora.NAME.{key}" for key in config.Corpus.model_fields if key != "name"} <= set(told.splitlines())
    assert {f"  --evaluate.tasks.NAME.{key}" for key in config.Task.model_fields if key != "name"} <= set(told.splitlines())
    assert "\n  --train.loss.NAME\n                        Weight of a loss term (cosine, " in told


@pytest.mark.parametrize(
    "argv", [["--data.languages", "[oops"], ["--train.loss", "{mse"], ["--train.steps", "many"], ["--data.corpora", "x"]]
)
def test_overrides_that_make_no_sense_are_refused_in_one_message(tmp_path: Path, argv: list[str]) -> None:
    with pytest.raises(Refused):
        parse(tmp_path, *argv)


def test_unknown_options_end_the_program_with_a_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, "--train.learning_rate", "1")
    assert end.value.code == 2
    assert "unrecognized arguments: --train.learning_rate" in capsys.readouterr().err


def test_the_environment_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN", '{"name": "env"}')
    monkeypatch.setenv("TRAIN__LR", "1")
    assert parse(tmp_path).run.name == "r"
    assert parse(tmp_path).train.lr == 5e-4


def test_folders_become_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = parse(tmp_path, text="run: {name: r, storage: runs}\ndata: {root: d}")
    assert found.folder == f"{tmp_path}/runs/r"
    assert found.located("x/a.tsv") == f"{tmp_path}/d/x/a.tsv"
    assert found.located("/abs.tsv") == "/abs.tsv"
    assert found.located("s3://b/a.tsv") == "s3://b/a.tsv"
    remote = parse(tmp_path, text="run: {storage: s3://b/runs/}\ndata: {root: s3://b/d}")
    assert remote.folder == "s3://b/runs/run"
    assert remote.located("a.tsv") == "s3://b/d/a.tsv"
    assert recipes.load(recipe(tmp_path, "teacher: {model: tmp}")).teacher.model == "tmp"
    (tmp_path / "teacher").mkdir()  # a folder of that name is not what student.base: teacher means
    found = recipes.load(recipe(tmp_path, "teacher: {model: teacher}"))
    assert (found.teacher.model, found.student.base) == (f"{tmp_path}/teacher", "teacher")


def test_languages_of_a_task() -> None:
    task = {"name": "t", "kind": "sts", "test": "{lang}"}
    found = Recipe(data={"languages": ["es", "de"]}, evaluate={"tasks": [task, task | {"name": "u", "languages": ["de", "en", "it"]}]})
    assert [found.task_languages(task) for task in found.evaluate.tasks] == [["en", "es", "de"], ["en", "de"]]


def test_a_checkout_that_moved_is_the_same_recipe(tmp_path: Path) -> None:
    text = 'data: {root: "{recipe}/d", corpora: [{name: a, path: "{recipe}/a-{lang}.tsv"}]}'
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = (recipes.load(recipe(tmp_path / name, text)) for name in ("old", "new"))
    assert old.data.corpora[0].path == f"{tmp_path}/old/a-{{lang}}.tsv"
    assert recipes.differing(old.model_dump(), new.model_dump()) == []
    # the run's own copy of its recipe still stands for the same files
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(old.model_dump(mode="json")))
    assert recipes.load(copy) == old


def test_differing_names_keys_and_looks_past_places() -> None:
    corpus, task = {"name": "a", "path": "x"}, {"name": "t", "kind": "sts", "test": "{lang}"}
    old = Recipe(data={"corpora": [corpus]}, evaluate={"tasks": [task]}).model_dump(mode="json")
    free = Recipe(
        run={"storage": "/elsewhere"}, data={"root": "/d", "corpora": [corpus]}, evaluate={"tasks": [task]},
        cluster={"num_cpus": 1, "verbose": True}, track={"uri": "http://x"},
    )  # fmt: skip
    assert recipes.differing(old, free.model_dump(mode="json")) == []
    changed = Recipe(
        data={"corpora": [corpus | {"weight": 2}, corpus | {"name": "b"}]}, evaluate={"tasks": [task]}, train={"lr": 1, "loss": {"mse": 1}}
    )
    lines = recipes.differing(old, changed.model_dump(mode="json"))
    assert "data.corpora.a.weight: 1.0 → 2.0" in lines
    assert "train.lr: 0.0005 → 1.0" in lines
    assert {"train.loss.mse: None → 1.0", "train.loss.cosine: 1.0 → None"} <= set(lines)
    assert any(line.startswith("data.corpora.b.path: None → x") for line in lines)


def test_a_recipe_survives_being_written_down() -> None:
    import yaml

    found = recipes.load(ROOT / "recipes" / "demo.yaml")
    again = Recipe(**yaml.safe_load(yaml.safe_dump(found.model_dump(mode="json"))))
    assert again == found
    assert recipes.differing(found.model_dump(mode="json"), again.model_dump(mode="json")) == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_of_the_project_are_valid(path: Path) -> None:
    assert recipes.load(path).data.corpora


def test_every_field_has_a_help_text() -> None:
    from pydantic import BaseModel

    def fields(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                fields(kind)
            else:
                assert field.description, f"{model.__name__}.{name}"

    for model in (Recipe, config.Corpus, config.Task):
        fields(model)


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_help_answers_at_once_and_loads_nothing_heavy(path: Path) -> None:
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(path)!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'pyarrow', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        found = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "120"}
        )
        taken.append(time.perf_counter() - started)
        assert found.returncode == 0, found.stderr
        assert "--train.lr" in found.stdout
        assert "Peak learning rate" in found.stdout
        if taken[-1] < 1:
            break
    assert min(taken) < 1


def test_jobs_tell_mistakes_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/prepare.py", recipe(tmp_path, "train: {stesp: 5}")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 2
    assert "xdist: " in found.stderr
    assert "did you mean train.steps?" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(("error", "code"), [(None, 0), (Refused("mend it"), 2), (KeyboardInterrupt(), 130)])
def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException | None, code: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", recipe(tmp_path), "--dry-run"])
    seen = []

    def work(found: Recipe, dry_run: bool) -> None:
        seen.append((found.run.name, dry_run))
        if error:
            raise error

    assert job.run("about", work, {"dry-run": "plan only"}) == code
    assert seen == [("r", True)]
    assert ("mend it" in capsys.readouterr().err) == (code == 2)


def test_a_run_of_a_version_that_lacked_a_key_is_the_same_recipe() -> None:
    new = Recipe().model_dump(mode="json")
    old = {name: dict(keys) for name, keys in new.items() if name != "finetune"}
    del old["train"]["clip"]
    assert recipes.differing(old, new) == []
    assert recipes.differing(old, Recipe(train={"clip": 2}).model_dump(mode="json")) == ["train.clip: 1.0 → 2.0"]  # type: ignore[arg-type]
    gone = old | {"magic": {"on": True}}
    assert recipes.differing(gone, new) != []


@pytest.mark.parametrize(("given", "workers", "kept"), [("4", (4, 4), 4), ("[1,4]", (1, 4), [1, 4]), ("1,4", (1, 4), [1, 4])])
def test_workers_are_a_number_or_least_and_most(tmp_path: Path, given: str, workers: tuple[int, int], kept: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {micro_batches: 4}\n")
    recipe, _ = recipes.parse([str(path), "--cluster.workers", given], "")
    assert recipe.cluster.workers == workers
    assert recipe.model_dump(mode="json")["cluster"]["workers"] == kept
    assert Recipe(**recipe.model_dump()) == recipe


def test_the_tracking_server_of_the_environment_counts_where_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("run: {name: r}\n")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert recipes.load(path).track.uri is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert recipes.load(path).track.uri == "http://mlflow:5000"
    assert recipes.load(path, {"track": {"uri": "http://other:5000"}}).track.uri == "http://other:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow:5000")
    with pytest.raises(Refused, match=r"track\.uri holds a password"):
        recipes.load(path)
