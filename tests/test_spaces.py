"""Search spaces: parsing, refusals, and the trials that come of them."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from xdist import recipes, spaces
from xdist.config import Recipe
from xdist.errors import Refused
from xdist.spaces import Space

ROOT = Path(__file__).parent.parent


def loaded(path: Path, recipe: Recipe) -> Space:
    return spaces.load(path, recipes.read_yaml(path, "space", "tune_spaces/"), recipe)


def space(search: dict[str, Any], **keys: Any) -> Space:
    return Space(name="test", search=search, **keys)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Space]:
    def write(search: dict[str, Any], **keys: Any) -> Space:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"search": search, **keys}))
        return loaded(path, recipes.load(ROOT / "recipes" / "demo.yaml"))

    return write


SEARCHES = [path for path in sorted((ROOT / "tune_spaces").glob("*.yaml")) if "search:" in path.read_text()]


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", ["demo", "biomed"])
def test_shipped_spaces_fit_the_recipes(path: Path, recipe: str) -> None:
    found = loaded(path, recipes.load(ROOT / "recipes" / f"{recipe}.yaml"))
    assert found.name == path.stem
    assert len(spaces.trials(found)) >= 3


def test_grids_are_tried_in_every_combination_once() -> None:
    found = spaces.trials(space({"train.lr": {"grid": [1, 2, 3]}, "train.clip": {"grid": [4, 5]}}))
    assert [tuple(trial.values()) for trial in found] == list(itertools.product([1, 2, 3], [4, 5]))


def test_samples_are_drawn_for_each_combination_and_repeats_left_out() -> None:
    drawn = spaces.trials(space({"train.clip": {"grid": [1, 2]}, "train.lr": {"uniform": [0.1, 0.2]}}, samples=5))
    assert len(drawn) == 10
    assert [trial["train.clip"] for trial in drawn].count(1) == 5
    assert len(spaces.trials(space({"train.clip": {"choice": [1, 2]}}, samples=50))) == 2


def test_every_trial_with_every_seed() -> None:
    found = spaces.trials(space({"train.clip": {"grid": [1, 2]}}, seeds=[7, 8]))
    assert [(trial["train.clip"], trial["run.seed"]) for trial in found] == [(1, 7), (1, 8), (2, 7), (2, 8)]


def test_a_conditional_key_is_left_out_where_it_does_not_apply() -> None:
    temperature = {"grid": [0.02, 0.1], "when": {"train.loss.contrastive": [0.5, 1]}}
    found = spaces.trials(space({"train.loss.contrastive": {"grid": [0, 1]}, "train.loss_temperature": temperature}))
    assert found == [
        {"train.loss.contrastive": 0},
        {"train.loss.contrastive": 1, "train.loss_temperature": 0.02},
        {"train.loss.contrastive": 1, "train.loss_temperature": 0.1},
    ]


@settings(deadline=None)
@given(st.floats(1e-6, 1e3), st.floats(1.01, 100), st.integers(0, 2**32))
def test_draws_stay_within_their_bounds(low: float, factor: float, seed: int) -> None:
    high = low * factor
    search = {"x.a": {"loguniform": [low, high]}, "x.b": {"uniform": [low, high]}, "x.c": {"randint": [3, 5]}}
    for trial in spaces.trials(space(search, samples=3), seed):
        assert all(low * 0.999 <= trial[f"x.{key}"] <= high * 1.001 for key in "ab")  # four digits are kept
        assert trial["x.c"] in (3, 4, 5)


def test_loguniform_draws_each_decade_as_often() -> None:
    drawn = [trial["train.lr"] for trial in spaces.trials(space({"train.lr": {"loguniform": [1e-4, 1e-1]}}, samples=3000))]
    shares = [sum(low <= value < 10 * low for value in drawn) / len(drawn) for low in (1e-4, 1e-3, 1e-2)]
    assert shares == pytest.approx([1 / 3] * 3, abs=4 * math.sqrt(2 / 9 / 3000))


def test_trials_are_a_function_of_space_and_seed() -> None:
    searched = space({"train.lr": {"uniform": [0, 1]}}, samples=4)
    assert spaces.trials(searched) == spaces.trials(searched) != spaces.trials(searched, seed=1)


def test_what_only_holds_together_is_not_refused(load: Callable[..., Space]) -> None:
    soft = {"grid": [0.5], "when": {"finetune.task": "specialty"}}
    found = spaces.trials(load({"finetune.task": {"grid": [None, "specialty"]}, "train.loss.soft_labels": soft}))
    assert found == [{"finetune.task": None}, {"finetune.task": "specialty", "train.loss.soft_labels": 0.5}]


def test_samples_of_a_conditional_grid_are_as_many_for_each_arm() -> None:
    temperature = {"grid": [0.02, 0.05, 0.1], "when": {"train.loss.contrastive": "1e0"}}
    search = {"train.loss.contrastive": {"grid": [0, 1]}, "train.loss_temperature": temperature, "train.lr": {"uniform": [0, 1]}}
    found = spaces.trials(space(search, samples=4))
    arms = [(trial["train.loss.contrastive"], trial.get("train.loss_temperature")) for trial in found]
    assert {arm: arms.count(arm) for arm in arms} == {(0, None): 4, (1, 0.02): 4, (1, 0.05): 4, (1, 0.1): 4}


def test_numbers_as_yaml_spells_them(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "search: {train.lr: {grid: [1e-4, 2.5E-3, 1]}, train.clip: {loguniform: [1e-2, 1e1]}}\nfixed: {train.weight_decay: 1e-2}"
    )
    found = loaded(path, Recipe())
    assert found.search["train.lr"].grid == [1e-4, 2.5e-3, 1]
    assert found.search["train.clip"].loguniform == (0.01, 10.0)
    assert found.fixed == {"train.weight_decay": 0.01}


@pytest.mark.parametrize(
    ("search", "keys", "message"),
    [
        ({"train.lrr": {"grid": [1]}}, {}, r"train\.lrr: unknown key; did you mean train\.lr\?"),
        ({"train.lr": {"grid": [-1]}}, {}, r"train\.lr: Input should be greater than 0"),
        ({"train.lr": {"grid": []}}, {}, "at least 1 item"),
        ({"train.lr": {}}, {}, "give exactly one of grid, choice, uniform, loguniform, randint; found none"),
        ({"train.lr": {"grid": [1], "uniform": [0, 1]}}, {}, "found grid, uniform"),
        ({"train.lr": {"uniform": [2, 1]}}, {}, "the first bound of uniform must be below the second"),
        ({"train.lr": {"loguniform": [0, 1]}}, {}, "loguniform needs bounds above 0"),
        ({"train.lr": {"between": [0, 1]}}, {}, "unknown key"),
        ({"train.lr": {"grid": [1], "when": {"train.clip": 1}}}, {}, "which is not searched"),
        ({"train.clip": {"grid": [1]}, "train.lr": {"grid": [1], "when": {"train.clip": 2}}}, {}, "none of its values"),
        ({"run.name": {"grid": ["a", "b"]}}, {}, r"run\.name cannot be searched"),
        ({"run.seed": {"grid": [1, 2]}}, {}, "use `seeds`"),
        ({"cluster.workers": {"grid": [1, 2]}}, {}, "set it in the recipe"),
        ({"train.lr": {"grid": [1]}}, {"fixed": {"train.lr": 2}}, "both searched and fixed"),
        ({"train.lr": {"grid": [1]}}, {"fixed": {"train.stepz": 2}}, r"did you mean train\.steps"),
        ({"train.lr": {"grid": [1]}}, {"seeds": [1, 1]}, "a seed is listed twice"),
        ({"train.lr": {"grid": [1]}}, {"searcher": "tpe"}, "tpe knows no grid"),
        ({"data.sample": {"uniform": [0.1, 1]}}, {"searcher": "tpe"}, "its values must be listed"),
        ({"data.corpora.nothing.weight": {"grid": [1]}}, {}, "no such entry; there are sentences, terms"),
        ({"train.lr.peak": {"grid": [1]}}, {}, "lr has no keys of its own"),
        ({}, {}, "at least 1 item"),
        ({"train.lr": {"grid": [1]}}, {"fixed": {"student": {"layers": [0]}}}, "student is a section of the recipe; name its keys"),
        ({"train.lr": {"uniform": [0.1, 1]}}, {"searcher": "tpe", "seeds": [1]}, "leave seeds out"),
        (
            {"train.loss.cosine": {"grid": [0, 1]}, "train.loss.similarity": {"grid": [0, 1]}},
            {"fixed": {"train.loss.soft_contrastive": 0}},
            "all weights are zero",
        ),
        ({"student.dropout": {"uniform": [0.5, 1.4]}}, {"samples": 50}, r"student\.dropout: Input should be less than 1"),
        ({"train.lr": {"grid": [1]}}, {"name": "../up"}, "name"),
        ({"train.lr": {"grid": [1]}}, {"schedular": "asha"}, "unknown key; did you mean scheduler"),
    ],
)
def test_impossible_spaces_are_refused(load: Callable[..., Space], search: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        load(search, **keys)
    assert "mine.yaml" in str(refused.value)


def test_a_missing_space_is_refused() -> None:
    with pytest.raises(Refused, match=r"space nowhere\.yaml does not exist; tune_spaces/ holds examples"):
        loaded(Path("nowhere.yaml"), Recipe())


def test_named_entries_and_mappings_are_reached_by_their_dotted_keys() -> None:
    recipe = recipes.load(ROOT / "recipes" / "demo.yaml")
    found = recipes.applied(recipe, {"data.corpora.terms.weight": 5, "train.loss.mse": 2, "train.lr": 0.1})
    assert {corpus.name: corpus.weight for corpus in found.data.corpora} == {"sentences": 6, "terms": 5, "phrases": 1, "everyday": 3}
    assert found.train.loss == {"cosine": 1, "similarity": 10, "soft_contrastive": 0.2, "mse": 2}
    assert recipe.train.lr == 4e-4


def test_what_acts_in_training_alone_shares_its_shards() -> None:
    trial = {"train.lr": 1, "data.sample": 0.5, "data.corpora.terms.weight": 2, "data.temperature": 3, "run.seed": 4, "student.layers": [0]}
    assert spaces.preparation(trial) == {"data.sample": 0.5, "student.layers": [0]}


def test_preparations_of_a_tpe_space_are_all_combinations() -> None:
    search = {"data.sample": {"choice": [0.5, 1]}, "student.layers": {"choice": [[0], [0, 1]]}, "train.lr": {"uniform": [0, 1]}}
    found = spaces.preparations(space(search, searcher="tpe"))
    assert [tuple(map(str, trial.values())) for trial in found] == [("0.5", "[0]"), ("0.5", "[0, 1]"), ("1", "[0]"), ("1", "[0, 1]")]
    assert spaces.preparations(space({"train.lr": {"uniform": [0, 1]}}, searcher="tpe")) == [{}]
    conditional = {"train.clip": {"choice": [1, 2]}, "data.sample": {"choice": [0.5, 1], "when": {"train.clip": 1}}}
    assert spaces.preparations(space(conditional, searcher="tpe")) == [{"data.sample": 0.5}, {"data.sample": 1}, {}]


def test_a_written_recipe_is_the_recipe(tmp_path: Path) -> None:
    recipe = recipes.applied(recipes.load(ROOT / "recipes" / "demo.yaml"), {"train.lr": 0.123})
    path = tmp_path / "best.yaml"
    path.write_text(spaces.written(recipe, "why"))
    assert recipes.load(path) == recipe
    assert path.read_text().startswith("# why\n")
