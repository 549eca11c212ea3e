"""Search spaces: what to try on a recipe, from a YAML file. Pure: nothing is run here.

    search:
      train.lr: {loguniform: [1e-4, 2e-3]}
      train.loss.similarity: {grid: [0, 10]}
      train.loss_temperature: {uniform: [0.02, 0.2], when: {train.loss.similarity: 0}}

A key is any recipe key, dotted, with named entries of lists by their name (data.corpora.orphanet.weight). `grid` tries every
value, in every combination; the others are drawn. `when` takes a key out of the trials in which another has none of the
given values.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from xdist import recipes
from xdist.config import Recipe, Section
from xdist.errors import Refused

KINDS = ("grid", "choice", "uniform", "loguniform", "randint")
FIXED_BY_THE_SEARCH = ("run.name", "run.storage", "run.recipe_folder", "run.seed", "data.root", "evaluate.", "track.", "cluster.")
TRAINING_ALONE = ("run.seed", "train.", "data.temperature", "data.source_weight", "data.window")

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")

Trial = dict[str, Any]  # dotted key → value


class Knob(Section):
    """The values of one key: exactly one of grid, choice, uniform, loguniform and randint."""

    grid: Annotated[list[Any], Field(min_length=1)] | None = None
    """Every value is tried, in every combination with other grids."""
    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these values."""
    uniform: tuple[float, float] | None = None
    """A number between two bounds."""
    loguniform: tuple[float, float] | None = None
    """A number between two bounds, its logarithm evenly spread."""
    randint: tuple[int, int] | None = None
    """A whole number between two bounds, both included."""
    when: dict[str, Any] = Field(default={})
    """Only in trials in which each of these keys has this value (or one of a list of values)."""

    @field_validator("grid", "choice")
    @classmethod
    def _numbers(cls, values: list[Any] | None) -> list[Any] | None:
        return values and [_number(value) for value in values]

    @field_validator("when")
    @classmethod
    def _wanted(cls, when: dict[str, Any]) -> dict[str, Any]:
        return {key: [_number(value) for value in _listed(wanted)] for key, wanted in when.items()}

    @model_validator(mode="after")
    def _one_kind(self) -> "Knob":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}; found {', '.join(given) or 'none'}")
        bounds = self.uniform or self.loguniform or self.randint
        if bounds and not (math.isfinite(bounds[0]) and math.isfinite(bounds[1]) and bounds[0] < bounds[1]):
            raise ValueError(f"the first bound of {given[0]} must be below the second, both finite; found {list(bounds)}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform needs bounds above 0; found {list(self.loguniform)}")
        return self

    @property
    def values(self) -> list[Any] | None:
        """All values, where there are finitely many that are listed."""
        return self.grid if self.grid is not None else self.choice

    def draw(self, rng: np.random.Generator) -> Any:
        """A value at random."""
        if self.values is not None:
            return self.values[rng.integers(len(self.values))]
        if self.randint:
            return int(rng.integers(self.randint[0], self.randint[1] + 1))
        if self.loguniform:
            low, high = map(math.log, self.loguniform)
            return float(f"{math.exp(rng.uniform(low, high)):.4g}")
        low, high = self.uniform or (0.0, 0.0)
        return float(f"{rng.uniform(low, high):.4g}")


class Space(Section):
    """A search over recipe keys."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the search; the file's own by default. Its folder is <storage>/<run.name>-<name>."""
    search: dict[str, Knob] = Field(min_length=1)
    """The keys to search and their values."""
    fixed: dict[str, Any] = Field(default={})
    """Recipe keys that every trial has in common, where they differ from the recipe: {train.steps: 300}."""
    samples: int = Field(default=1, ge=1)
    """Random draws for each combination of grids; with searcher tpe, the number of trials."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[])
    """Values of run.seed, where it is not to be the recipe's; every trial is run with each."""
    searcher: Literal["random", "tpe"] = "random"
    """random draws independently; tpe (Optuna; install the `optuna` extra) draws near what was good."""
    scheduler: Literal["none", "asha", "median"] = "none"
    """asha stops all but the best part of the trials at each of a few times of training; median stops those below the median."""
    reduction: int = Field(default=4, ge=2)
    """asha: one in this many trials goes on at each time, and times are this far apart."""
    grace_steps: int | None = Field(default=None, ge=1)
    """Training steps before a trial may be stopped; train.evaluate_every when not given."""
    metric: str = "selection"
    """What trials are compared by: selection (see docs/architecture.md), accuracy (its mean), or one accuracy as training
    prints it: translation_de, topic/es."""
    mode: Literal["max", "min"] = "max"
    """Whether a larger metric is better."""
    minutes: float | None = Field(default=None, gt=0)
    """Time of one start: after it no trial begins and running ones stop; the same command goes on with them, with as many minutes more."""
    at_once: int | None = Field(default=None, ge=1)
    """Trials at the same time; as many as the cluster has room for when not given."""

    @field_validator("fixed")
    @classmethod
    def _numbers(cls, fixed: dict[str, Any]) -> dict[str, Any]:
        return {key: _number(value) for key, value in fixed.items()}

    @field_validator("search")
    @classmethod
    def _conditions(cls, search: dict[str, Knob]) -> dict[str, Knob]:
        for key, knob in search.items():
            for other, wanted in knob.when.items():
                if other not in search:
                    raise ValueError(f"{key}: `when` asks for {other}, which is not searched; search it, or leave `when` out")
                if search[other].when:
                    raise ValueError(f"{key}: `when` asks for {other}, which is conditional itself; ask for what that one asks for")
                known = search[other].values
                if known is not None and not any(value in wanted for value in known):
                    raise ValueError(f"{key}: `when` asks for {other} in {wanted}, which is none of its values {known}")
        return search

    @model_validator(mode="after")
    def _cross_check(self) -> "Space":
        for key in [*self.search, *self.fixed]:
            if key.startswith(FIXED_BY_THE_SEARCH):
                hint = "use `seeds`" if key == "run.seed" else "set it in the recipe"
                raise ValueError(f"{key} cannot be searched or fixed in a space; {hint}")
            if "." not in key:
                raise ValueError(f"{key} is a section of the recipe; name its keys one by one ({key}.…)")
        for key in self.search.keys() & self.fixed.keys():
            raise ValueError(f"{key} is both searched and fixed; leave one out")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is listed twice")
        if self.searcher == "tpe":
            if self.seeds:
                raise ValueError("seeds: searcher tpe learns from single trials; leave seeds out, or take searcher: random")
            for key, knob in self.search.items():
                if knob.grid is not None:
                    raise ValueError(f"{key}: searcher tpe knows no grid; write choice, or searcher: random")
                if knob.values is None and not trains_alone(key):
                    raise ValueError(f"{key}: with searcher tpe its values must be listed (choice): each needs training shards of its own")
        return self


def trains_alone(key: str) -> bool:
    """Whether a key acts in training alone, so that trials with other values of it share their training shards."""
    return key.startswith(TRAINING_ALONE) or (key.startswith("data.corpora.") and key.endswith(".weight"))


def _number(value: Any) -> Any:
    """YAML reads 1e-4 as text and only 1.0e-4 as a number; here both are numbers."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def load(path: str | os.PathLike[str], settings: dict[str, Any], recipe: Recipe) -> Space:
    """A space from its file's content, checked against the recipe that it is to vary. Raises Refused."""
    try:
        space = Space(**({"name": Path(path).stem} | settings))
    except ValidationError as error:
        raise Refused("\n".join(recipes.explained(error, str(path), list(Space.model_fields)))) from None
    fixed = recipes.applied(recipe, space.fixed, str(path))
    for trial in trials(space):
        recipes.applied(fixed, trial, str(path))
    return space


def trials(space: Space, seed: int = 0) -> list[Trial]:
    """All trials of a space with searcher random, each once: grids in every combination, `samples` draws of the other keys for
    each of them, every one with every seed. A pure function of space and seed."""
    rng = np.random.default_rng(seed)
    grids = {key: knob.grid for key, knob in space.search.items() if knob.grid is not None}
    combinations = [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
    found: list[Trial] = []
    for _ in range(space.samples):
        for combination in _unique(conditioned(space, combination, set(grids)) for combination in combinations):
            drawn = {
                key: combination[key] if key in grids else knob.draw(rng)
                for key, knob in space.search.items()
                if key not in grids or key in combination
            }
            found.append(conditioned(space, drawn))
    found = _unique(found)
    seeds: list[Trial] = [{"run.seed": number} for number in space.seeds] or [{}]
    return [trial | own for trial in found for own in seeds]


def _unique(trials: Iterable[Trial]) -> list[Trial]:
    return list({json.dumps(trial, sort_keys=True, default=str): trial for trial in trials}.values())


def conditioned(space: Space, trial: Trial, known: set[str] | None = None) -> Trial:
    """A trial without the keys whose `when` is not met. With `known`, only conditions on these keys count."""
    return {
        key: value
        for key, value in trial.items()
        if all(
            trial.get(other) in wanted
            for other, wanted in (space.search[key].when.items() if key in space.search else ())
            if known is None or other in known
        )
    }


def preparations(space: Space) -> list[Trial]:
    """For searcher tpe: every combination of those keys that ask for training shards of their own. A key that is conditional on
    another that does not is there and is not."""
    keys = [key for key in space.search if not trains_alone(key)]
    options: list[list[Trial]] = [
        [{key: value} for value in space.search[key].values or []] + ([{}] if not space.search[key].when.keys() <= set(keys) else [])
        for key in keys
    ]
    combinations = ({key: value for part in parts for key, value in part.items()} for parts in itertools.product(*options))
    return _unique(conditioned(space, combination, set(keys)) for combination in combinations)


def preparation(trial: Trial) -> Trial:
    """The part of a trial that its training shards depend on."""
    return {key: value for key, value in trial.items() if not trains_alone(key)}


def written(recipe: Recipe, origin: str) -> str:
    """A recipe as YAML that a person can read and run: what differs from the defaults."""
    settings = recipe.model_dump(mode="json", exclude_defaults=True)
    return f"# {origin}\n" + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)
