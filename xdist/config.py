"""Settings: the sections of a recipe, their types, defaults and cross-checks. Reads and writes nothing.

Each field's docstring is its help text. Unknown keys, wrong types and contradictions are refused before anything starts.
Secrets never go in a recipe: credentials come from the environment that the storage and tracking libraries read.
"""

import difflib
import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

RESERVED = ("store", "teachers", "mlflow.db", "mlartifacts")  # what lies beside the runs
LANGUAGE = re.compile(r"[A-Za-z]{2,8}([-_][A-Za-z0-9]{1,8})*")
LOSSES = ("cosine", "similarity", "mse", "contrastive", "soft_contrastive", "soft_labels")


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class Run(Section):
    """The identity of a run: the same name and storage continue the same run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
    """Name of the run; its folder is <storage>/<name>. Slashes group runs: team/first."""
    storage: str = "runs"
    """Folder or URI (s3://, gs://, abfs://) that holds runs and the store of teacher vectors."""
    recipe_folder: str = ""
    """Folder that {recipe} stands for in every text; by default the recipe file's own."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random: order, new weights, samples, bootstrap."""

    @field_validator("name")
    @classmethod
    def _free_name(cls, value: str) -> str:
        if value.split("/")[0] in RESERVED:
            raise ValueError(f"{value!r} is the name of something else in run.storage; take another")
        return value


class Corpus(Section):
    """Parallel text: one file, a glob, a folder or a Hugging Face data set."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name used in counts, rejects and reports."""
    path: str
    """File, glob, folder or URI, relative to data.root; {lang} stands for the language, {recipe} for the recipe's folder.
    `hf://owner/name` reads a hub set."""
    target_path: str | None = None
    """Moses pairs: the file with the translations, line by line parallel to `path`; {lang} as in `path`."""
    format: Literal["auto", "tsv", "csv", "jsonl", "parquet", "tmx", "moses", "hf", "phrases"] = "auto"
    """Format; auto goes by the file's ending, seen through .gz, .bz2 and .zst."""
    languages: list[str] | None = None
    """Languages that this corpus has, where it lacks some of data.languages."""
    codes: dict[str, str] = {}
    """How this corpus spells a language where it differs, for {lang} and TMX: {es: es-LA}."""
    source: str = "source"
    """Column with the source text; {lang} stands for the source language, a dot enters a nested column (translation.en)."""
    target: str = "target"
    """Column with the translation; {lang} stands for the language."""
    id: str | None = None
    """Column with an id shared with evaluation tasks; see shares_ids_with."""
    shares_ids_with: list[str] = []
    """Evaluation tasks whose dev and test ids name rows of this corpus: those rows are kept out of training."""
    where: dict[str, str | list[str]] = {}
    """Keep only rows whose column has this value (or one of these values): {split: train}."""
    weight: float = Field(default=1.0, gt=0)
    """How many times each of its sequences is seen per epoch, on average, before language sampling."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read only this many rows of each file, from its beginning."""
    subset: str | None = None
    """Hugging Face data sets: the configuration's name."""
    split: str = "train"
    """Hugging Face data sets: the split."""

    @model_validator(mode="after")
    def _pairs(self) -> "Corpus":
        if self.target_path and self.format not in ("auto", "moses"):
            raise ValueError(f"corpus {self.name!r}: target_path belongs to format moses, not {self.format}; leave one of them out")
        if self.format == "moses" and not self.target_path and not self.path.endswith(".zip"):
            raise ValueError(f"corpus {self.name!r}: format moses needs target_path, the file with the translations")
        return self


class Data(Section):
    """Where text comes from and what is kept of it."""

    root: str = "."
    """Folder or URI that relative paths of corpora and tasks start from."""
    source_language: str = "en"
    """Language of the source side, which the teacher knows."""
    languages: list[str] = Field(default=["es", "fr", "de"], min_length=1)
    """Languages that the student learns, beside the source language."""
    corpora: list[Corpus] = []
    """The parallel corpora."""
    min_chars: int = Field(default=2, ge=1)
    """Shortest text kept, in characters."""
    max_chars: int = Field(default=2000, ge=1)
    """Longest text kept, in characters."""
    max_length_ratio: float = Field(default=4.0, ge=1)
    """Longest side over shortest side, in characters (8 characters are added to each, so that short terms pass)."""
    detect_language: bool = False
    """Drop rows whose text is not in the language it claims (lingua; install the `langid` extra)."""
    temperature: float = Field(default=1.0, ge=1)
    """Language sampling: share proportional to size ** (1 / temperature). 1 is natural, larger favours small languages."""
    source_weight: float = Field(default=1.0, ge=0)
    """How often a source sentence itself is seen per epoch, against 1 for a translation. 0 trains on translations only."""
    holdout: int = Field(default=1000, ge=0)
    """Source sentences (with translations) kept out of training to select the best checkpoint; at most 5 % of a shard."""
    sample: float = Field(default=1.0, gt=0, le=1)
    """Share of the source sentences to train on, chosen by hash, so that smaller samples are contained in larger ones."""
    shards: int | None = Field(default=None, ge=1)
    """Number of shards, a power of two; chosen from the input's size when not given."""
    window: int = Field(default=8, ge=1)
    """Shards shuffled together in training; memory holds two windows."""

    @field_validator("source_language", "languages")
    @classmethod
    def _codes(cls, value: str | list[str]) -> str | list[str]:
        codes = [value] if isinstance(value, str) else value
        for code in codes:
            if not LANGUAGE.fullmatch(code):
                raise ValueError(f"{code!r} is no language code; write es, pt-BR or zh-Hant")
            if codes.count(code) > 1:
                raise ValueError(f"{code!r} is listed twice")
        return value

    @field_validator("shards")
    @classmethod
    def _power_of_two(cls, value: int | None) -> int | None:
        if value is not None and value & (value - 1):
            raise ValueError(f"must be a power of two, so that shards of different runs nest; try {1 << value.bit_length()}")
        return value


class Teacher(Section):
    """The frozen English encoder."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence-transformers or plain Hugging Face checkpoint: hub id, folder, or package:NAME/FOLDER inside a Python package."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    max_length: int = Field(default=256, ge=8)
    """Longest input in tokens; the rest is cut off."""
    prompt: str = ""
    """Text put before every sentence, for teachers that were trained with one."""
    batch_tokens: int | None = Field(default=None, ge=64)
    """Tokens, padding included, of one forward pass; 2,048 on a CPU and 65,536 on a GPU when not given."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint carries. Only for checkpoints whose code you have read."""
    allow_pickle: bool = False
    """Read weights from pickle files (.bin), which can run code when read. Safetensors otherwise."""


class Finetune(Section):
    """Task knowledge, the second stage of Piperno et al.: the teacher learns a labelled task before it teaches."""

    task: str | None = None
    """Classification task (evaluate.tasks) on whose training rows in the source language the teacher is fine-tuned; its vectors
    are then what the student learns. Not fine-tuned when not given."""
    method: Literal["head", "contrastive"] = "head"
    """head: with a classification head. contrastive: sentences of one class are drawn together, as in SetFit."""
    epochs: int = Field(default=3, ge=1)
    """Passes over the training rows."""
    lr: float = Field(default=5e-5, gt=0)
    """Peak learning rate of the teacher's layers; linear decay to zero."""
    batch_size: int = Field(default=32, ge=2)
    """Sentences of one step."""


class Student(Section):
    """The multilingual encoder to be trained."""

    base: str = "teacher"
    """`teacher` builds on the teacher's own layers; otherwise a checkpoint as for teacher.model."""
    layers: list[int] | None = None
    """Layers of the base to keep, counted from 0, for example [0, 2, 5]; all when not given."""
    vocabulary: Literal["keep", "trim", "extend", "train"] = "keep"
    """keep: the base's. trim: only those of its tokens that occur in the corpus. extend: a WordPiece teacher's own tokens
    plus new ones for the other languages. train: a new one trained on the corpus."""
    vocabulary_size: int = Field(default=24000, ge=300)
    """Size of an extended or trained vocabulary, in tokens."""
    max_length: int = Field(default=128, ge=8)
    """Longest input in tokens; the rest is cut off."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout while training. 0 by default: teacher vectors are noiseless targets."""


class Train(Section):
    """How the student is trained."""

    steps: int | None = Field(default=None, ge=1)
    """Length of training in optimiser steps; `epochs` decides when not given."""
    epochs: float = Field(default=1.0, gt=0)
    """Length of training in passes over the training sequences."""
    batch_tokens: int = Field(default=4096, ge=16)
    """Tokens of one optimiser step, over all workers."""
    micro_batches: int = Field(default=1, ge=1)
    """Batches that a step is cut into (gradient accumulation, workers); in-batch losses see one of these at a time."""
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate."""
    embedding_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the token embeddings where the vocabulary has new tokens; 10 × lr when not given."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps of linear warm-up; linear decay to zero follows."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay, on matrices only."""
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    loss: dict[str, float] = {"cosine": 1.0, "similarity": 10.0}
    """Weight of each loss term: cosine, similarity, mse, contrastive, soft_contrastive, soft_labels (see finetune.task)."""
    loss_temperature: float = Field(default=0.05, gt=0)
    """Temperature of the contrastive losses."""
    matryoshka: list[Annotated[int, Field(ge=1)]] = []
    """Prefix lengths of the vector at which the loss is taken as well, for example [128, 256]."""
    evaluate_every: int = Field(default=500, ge=1)
    """Steps between evaluations on held-out text."""
    checkpoint_every: int = Field(default=250, ge=1)
    """Steps between checkpoints: the most work that a kill can cost."""
    log_every: int = Field(default=20, ge=1)
    """Steps between lines of progress and logged metrics."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of teacher and student; auto takes bfloat16 where the hardware computes in it."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """What computes the layers: eager and sdpa are the checkpoint's own modules with that attention kernel; auto takes
    xdist.layers on a CPU that computes in bfloat16, where they know the model, otherwise eager on a CPU and sdpa on a GPU."""

    @field_validator("loss")
    @classmethod
    def _known_losses(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if name not in LOSSES:
                raise ValueError(f"unknown loss {name!r}; {closest(name, LOSSES)}")
            if weight < 0:
                raise ValueError(f"weight of {name} is negative")
        if not any(value.values()):
            raise ValueError("all weights are zero, so there is nothing to learn")
        return value


class Task(Section):
    """A labelled or parallel evaluation set in plain TSV files with a header."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in tables and metrics."""
    kind: Literal["classification", "retrieval", "sts"]
    """classification: text, label. retrieval: rows of all languages joined by id. sts: two texts and a score."""
    languages: list[str] | None = None
    """Languages of the task where it lacks some; the source language and data.languages when not given."""
    codes: dict[str, str] = {}
    """How the task's paths and columns spell a language: {en: eng}."""
    train: str | None = None
    """Training rows (classification); {lang} stands for the language. Never decontaminated away."""
    dev: str | None = None
    """Development rows, kept out of training; those of classification and retrieval select the checkpoint."""
    test: str
    """Test rows, used once at the end and kept out of training."""
    text: str = "text"
    """Column with the text; {lang} stands for the language. STS: the first sentence."""
    text2: str = "text2"
    """STS: column with the second sentence."""
    label: str = "label"
    """Classification: column with the class."""
    score: str = "score"
    """STS: column with the similarity that people gave."""
    id: str | None = None
    """Column with the id that is the same in every language; retrieval joins on it, row order otherwise."""
    split: str | None = None
    """Column that holds train, dev or test, where one file holds all three."""
    shots: list[Annotated[int, Field(ge=1)]] = []
    """Classification: sizes of labelled samples in the target language for few-shot heads."""

    @model_validator(mode="after")
    def _needs_train(self) -> "Task":
        if self.kind == "classification" and not self.train:
            raise ValueError(f"classification task {self.name!r} needs `train`: the head is fitted on it")
        return self


class Evaluate(Section):
    """What the teacher and the student are measured on."""

    tasks: list[Task] = []
    """The evaluation tasks."""
    bootstrap: int = Field(default=1000, ge=0)
    """Bootstrap resamples for 95 % confidence intervals."""
    decontaminate: bool = True
    """Keep dev and test text, on either side, out of the training text."""


class Track(Section):
    """Where MLflow writes."""

    uri: str | None = None
    """MLflow tracking URI; MLFLOW_TRACKING_URI, or else an SQLite file in run.storage, when not given."""
    experiment: str = "xdist"
    """MLflow experiment."""


def _least_and_most(value: Any) -> tuple[int, int]:
    given = value if isinstance(value, list | tuple) else [value]
    try:
        numbers = [int(str(count)) for count in given]  # the command line gives texts; 1.5 and true are no numbers of workers
        least, most = numbers if len(numbers) > 1 else numbers * 2
    except ValueError:
        raise ValueError("expected a number of workers, or [least, most]") from None
    if not 1 <= least <= most:
        raise ValueError(f"{least} and {most} are not the least and the most of at least one worker")
    return least, most


Workers = Annotated[
    tuple[int, int],
    BeforeValidator(_least_and_most),
    PlainSerializer(lambda workers: workers[0] if workers[0] == workers[1] else list(workers), return_type=int | list[int]),
]


class Cluster(Section):
    """What the work runs on."""

    address: str | None = None
    """Ray address; a Ray of its own on this machine when not given (inside a Ray job: that cluster)."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs that a local Ray may use; all when not given."""
    workers: Workers = (1, 1)
    """Training workers; [least, most] for as many as there are machines, fewer and more while training goes on."""
    cpus_per_worker: int | None = Field(default=None, ge=1)
    """CPUs of a training worker or teacher actor; without GPUs, the machine's CPUs divided by the workers when not given."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs of a training worker or teacher actor; 1 where the cluster has any when not given."""
    teacher_actors: int | None = Field(default=None, ge=1)
    """Teacher actors; when not given, one per GPU, or, without GPUs, one per machine, or as many as workers if these are more."""
    wait_minutes: float = Field(default=30, ge=0)
    """How long a cluster may take to start the machines that a stage asks for, before the job gives up."""
    verbose: bool = False
    """Show Ray's own log lines and progress bars."""


class Recipe(BaseSettings):
    """One run, from corpora to report."""

    model_config = SettingsConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    run: Run = Run()
    data: Data = Data()
    teacher: Teacher = Teacher()
    finetune: Finetune = Finetune()
    student: Student = Student()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    track: Track = Track()
    cluster: Cluster = Cluster()

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is written in the recipe or on the command line counts; the environment does not."""
        return (init_settings,)

    @model_validator(mode="after")
    def _cross_check(self) -> "Recipe":
        names = [corpus.name for corpus in self.data.corpora] + [task.name for task in self.evaluate.tasks]
        tasks = {task.name: task for task in self.evaluate.tasks}
        for name in names:
            if names.count(name) > 1 and name not in tasks:
                raise ValueError(f"data.corpora: two corpora are called {name!r}; give each its own name")
        if len(tasks) < len(self.evaluate.tasks):
            raise ValueError("evaluate.tasks: two tasks have the same name; give each its own")
        for corpus in self.data.corpora:
            for name in corpus.shares_ids_with:
                if name not in tasks:
                    raise ValueError(f"data.corpora.{corpus.name}.shares_ids_with: no task {name!r}; {closest(name, tasks)}")
                if not tasks[name].id:
                    raise ValueError(f"data.corpora.{corpus.name}.shares_ids_with: task {name} has no `id`, the column with the ids")
            if corpus.shares_ids_with and not corpus.id:
                raise ValueError(f"data.corpora.{corpus.name}: shares_ids_with needs `id`, the column with the ids")
            if corpus.shares_ids_with and not self.evaluate.decontaminate:
                raise ValueError(f"data.corpora.{corpus.name}: shares_ids_with does nothing without evaluate.decontaminate")
        for task in self.evaluate.tasks:
            if task.languages is not None and self.data.source_language not in task.languages:
                raise ValueError(f"evaluate.tasks.{task.name}.languages: add the source language {self.data.source_language!r}")
            if len(self.task_languages(task)) > 1 and "{lang}" not in task.text and "{lang}" not in task.test:
                raise ValueError(f"evaluate.tasks.{task.name}: put {{lang}} in its paths or in `text`, or every language has the same text")
        labelled = [task.name for task in self.evaluate.tasks if task.kind == "classification"]
        if self.finetune.task and self.finetune.task not in labelled:
            raise ValueError(f"finetune.task: no classification task {self.finetune.task!r}; {closest(self.finetune.task, labelled)}")
        if self.train.loss.get("soft_labels") and not self.finetune.task:
            raise ValueError("train.loss.soft_labels needs finetune.task: the labels that it speaks of")
        if self.data.source_language in self.data.languages:
            raise ValueError(f"data.languages: {self.data.source_language!r} is the source language; leave it out")
        if self.data.min_chars > self.data.max_chars:
            raise ValueError(f"data.min_chars {self.data.min_chars} is above data.max_chars {self.data.max_chars}")
        most = self.cluster.workers[1]
        if self.train.micro_batches % most:
            raise ValueError(
                f"train.micro_batches {self.train.micro_batches} is not a multiple of cluster.workers {most}: "
                f"workers share out the micro-batches of a step, and some would wait for others; set train.micro_batches: {most}"
            )
        if self.student.vocabulary in ("extend", "train") and self.student.base != "teacher":
            raise ValueError(
                f"student.vocabulary: {self.student.vocabulary} needs student.base: teacher; for another checkpoint use trim or keep"
            )
        return self

    @property
    def folder(self) -> str:
        """The run's folder, absolute path or URI."""
        return f"{self.run.storage}/{self.run.name}"

    def located(self, path: str) -> str:
        """A path of a corpus or task as an absolute path or URI."""
        return absolute(path, self.data.root)

    def task_languages(self, task: Task) -> list[str]:
        """Languages that a task is measured in, the source language first."""
        wanted = [self.data.source_language, *self.data.languages]
        return [lang for lang in wanted if task.languages is None or lang in task.languages]


def absolute(path: str, root: str = ".") -> str:
    """`path` itself where it is a URI or absolute, else joined to `root` and made absolute."""
    if "://" in path:
        return path.rstrip("/")
    if "://" in root:
        return f"{root.rstrip('/')}/{path}"
    return os.path.abspath(os.path.join(root, path))


def closest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that was probably meant."""
    found = difflib.get_close_matches(name, known := list(known), n=1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else f"known: {', '.join(sorted(known))}"
