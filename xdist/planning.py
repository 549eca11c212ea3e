"""Plan: what a run will do and what it costs, measured by a short probe of the real teacher and the real student: in this process,
or, on a cluster, on one of the machines that will do the work.

Reads the prepared corpus, writes <run>/plan.json and prints it. What it builds (the clean corpus, the untrained student)
is what the run itself uses.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xdist import cluster, encoder, files, finetune
from xdist.config import Recipe
from xdist.corpus import Prepared
from xdist.embed import missing_per_shard
from xdist.encoder import Encoder
from xdist.progress import Progress, duration, say
from xdist.shards import sampling_weights
from xdist.store import VectorStore

PROBE_SENTENCES = 512
PROBE_SECONDS = 3.0


@dataclass(frozen=True)
class Plan:
    """Counts, bytes and estimated seconds. `seen` is how many texts of each language an epoch of training shows."""

    rows_read: int
    pairs: int
    sentences: int
    cached: int
    languages: dict[str, int]
    seen: dict[str, float]
    corpora: dict[str, int]
    rejected: dict[str, int]
    source_tokens: int
    training_tokens: int
    training_steps: int
    store_bytes: int
    shard_bytes: int
    model_bytes: int
    teacher_sentences_per_second: float
    student_tokens_per_second: float
    arithmetic: str
    embed_seconds: float
    train_seconds: float
    token_lengths: dict[str, list[int]]


def make(recipe: Recipe, prepared: Prepared, teacher: Encoder, store: VectorStore) -> Plan:
    """Probe teacher and untrained student on a sample of the corpus. Needs a connected Ray."""
    cached = prepared.sentences - sum(missing_per_shard(recipe, prepared, store))
    student = _untrained(recipe)
    sources, texts = _sample(recipe, prepared.shards)
    rates = (
        _rates_elsewhere(recipe, prepared.shards)
        if cluster.on_cluster(recipe.cluster)
        else _rates(recipe, teacher, student, sources, texts)
    )
    lengths = {lang: [len(row) for row in student.tokenize(found, recipe.student.max_length)] for lang, found in texts.items() if found}
    counts = {recipe.data.source_language: prepared.sentences} | prepared.languages
    seen = _seen(recipe, prepared)
    per_epoch = sum(count * float(np.mean(lengths[lang])) for lang, count in seen.items() if lang in lengths)
    steps = recipe.train.steps or max(1, round(recipe.train.epochs * per_epoch / recipe.train.batch_tokens))
    actors, workers = cluster.at_once(recipe.cluster)  # once the machine for the probe is there
    vector, parameters = 2 * teacher.dimension, sum(parameter.numel() for parameter in student.parameters())
    return Plan(
        rows_read=prepared.rows_read,
        pairs=prepared.pairs,
        sentences=prepared.sentences,
        cached=cached,
        languages=counts,
        seen=seen,
        corpora=prepared.corpora,
        rejected=prepared.rejected,
        source_tokens=round(prepared.sentences * float(np.mean([len(row) for row in teacher.tokenize(sources)]))),
        training_tokens=steps * recipe.train.batch_tokens,
        training_steps=steps,
        store_bytes=(prepared.sentences - cached) * (vector + 8),
        shard_bytes=round(prepared.sentences * vector + per_epoch * 2),
        model_bytes=parameters * (2 * 4 + 3 * 3 * 4),  # untrained and trained; three checkpoints, each with two moments
        teacher_sentences_per_second=rates.teacher,
        student_tokens_per_second=rates.student,
        arithmetic=rates.arithmetic,
        embed_seconds=(prepared.sentences - cached) / rates.teacher / actors,
        train_seconds=steps * recipe.train.batch_tokens / rates.student / workers,
        token_lengths={lang: np.bincount(np.minimum(found, recipe.student.max_length)).tolist() for lang, found in lengths.items()},
    )


@dataclass(frozen=True)
class Rates:
    """Sentences per second of the teacher, tokens per second of a training step, and by what arithmetic."""

    teacher: float
    student: float
    arithmetic: str


def _rates(recipe: Recipe, teacher: Encoder, student: Encoder, sources: list[str], texts: dict[str, list[str]]) -> Rates:
    """Measured in this process."""
    return Rates(
        _embed_rate(recipe, teacher, sources),
        _train_rate(recipe, student, [text for found in texts.values() for text in found]),
        f"{str(student.dtype).removeprefix('torch.')} on {student.device}, {student.kernels}",
    )


def _rates_elsewhere(recipe: Recipe, shards: int) -> Rates:
    """Measured in a process of the cluster that has what a teacher actor and a training worker have; the driver may be on a machine
    that does no such work."""
    cpus, gpus = cluster.resources(recipe.cluster)
    cluster.await_room(recipe.cluster, 1, cpus, gpus, "plan")
    arguments: dict[str, Any] = {"settings": recipe.model_dump(mode="json"), "threads": 0 if gpus else cpus}
    (found,) = cluster.stream([{"shards": shards}], _probe, Progress("plan", "probe"), cpus=cpus, gpus=gpus, **arguments)
    return Rates(**found)


def _probe(item: cluster.Item, board: cluster.RemoteBoard, settings: dict[str, Any], threads: int) -> cluster.Item:
    import torch

    if threads:
        torch.set_num_threads(threads)
    recipe = Recipe(**settings)
    return asdict(_rates(recipe, finetune.load(recipe), _untrained(recipe), *_sample(recipe, item["shards"])))


def _untrained(recipe: Recipe) -> Encoder:
    folder = files.local(f"{recipe.folder}/initial")
    return encoder.load(folder, recipe.train.precision, recipe.train.attention, recipe.teacher.trust_remote_code)


def _seen(recipe: Recipe, prepared: Prepared) -> dict[str, float]:
    """Texts of each language that an epoch of training shows: corpora by their weight, languages by the temperature."""
    sources = {name: prepared.sentences * count / prepared.pairs for name, count in prepared.corpora.items()}
    counts = {name: {recipe.data.source_language: sources[name]} | found for name, found in prepared.by_corpus.items()}
    weights = sampling_weights(recipe.data, counts)
    return {
        lang: recipe.data.sample * sum(found.get(lang, 0) * weights[name].get(lang, 0) for name, found in counts.items())
        for lang in [recipe.data.source_language, *recipe.data.languages]
    }


def _sample(recipe: Recipe, shards: int) -> tuple[list[str], dict[str, list[str]]]:
    """Source sentences, and texts by language, of the first shards."""
    sources: list[str] = []
    texts: dict[str, list[str]] = {}
    for shard in range(shards):
        table = files.read_table(f"{recipe.folder}/corpus/{shard:05d}.parquet", ["source", "languages", "texts"])
        table = table.slice(0, 4 * PROBE_SENTENCES)
        sources += table["source"].to_pylist()
        for languages, found in zip(table["languages"].to_pylist(), table["texts"].to_pylist(), strict=True):
            for lang, text in zip(languages, found, strict=True):
                texts.setdefault(lang, []).append(text)
        if len(sources) >= 4 * PROBE_SENTENCES:
            break
    return sources, {recipe.data.source_language: sources} | texts


def _embed_rate(recipe: Recipe, teacher: Encoder, sources: list[str]) -> float:
    """Sentences per second of the teacher here."""
    teacher.encode(sources[:64], recipe.teacher.batch_tokens, None, recipe.teacher.max_length)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < PROBE_SECONDS / 2:
        batch = [sources[(done + offset) % len(sources)] for offset in range(PROBE_SENTENCES)]
        teacher.encode(batch, recipe.teacher.batch_tokens, None, recipe.teacher.max_length)
        done += len(batch)
    return done / (time.perf_counter() - started)


def _train_rate(recipe: Recipe, student: Encoder, texts: list[str]) -> float:
    """Tokens per second of training steps here, on a copy of the student."""
    import copy

    from xdist import batching
    from xdist.shards import Batch
    from xdist.train import freeze_unused, make_optimizer, step

    model = copy.deepcopy(student)
    freeze_unused(model)
    optimizer = make_optimizer(model, recipe)
    rows = [np.array(row) for row in student.tokenize(texts, recipe.student.max_length)]
    per_batch = recipe.train.batch_tokens // recipe.train.micro_batches
    batches = []
    for picked in batching.token_batches(np.array([len(row) for row in rows]), per_batch):
        ids, mask = batching.padded([rows[index] for index in picked], student.model.tokenizer.pad_token_id)
        vectors = np.ones((len(picked), student.dimension), np.float32) / np.sqrt(student.dimension, dtype=np.float32)
        batches.append(Batch(ids, mask, vectors))
    rng = np.random.default_rng(0)
    tokens, started, warm = 0, time.perf_counter(), False
    while not warm or time.perf_counter() - started < PROBE_SECONDS:
        batch = batches[rng.integers(len(batches))]
        step(model, model, optimizer, [batch], recipe.train, 0.0, 1, False)
        tokens += int(batch.mask.sum())
        if not warm:
            tokens, started, warm = 0, time.perf_counter(), True
    return tokens / (time.perf_counter() - started)


def disk_bytes(plan: Plan) -> int:
    """What the run will write, but for the clean corpus, which is there."""
    return plan.store_bytes + plan.shard_bytes + plan.model_bytes


def show(recipe: Recipe, plan: Plan) -> None:
    """Print the plan."""

    def megabytes(count: int) -> str:
        return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"

    say(f"\nPlan of run {recipe.run.name}   ({recipe.folder})")
    say(f"  rows read            {plan.rows_read:>12,}")
    say(f"  pairs kept           {plan.pairs:>12,}   {_shares(plan.corpora)}")
    say(f"  unique sentences     {plan.sentences:>12,}   texts: {_shares(plan.languages)}")
    say(f"  already embedded     {plan.cached:>12,}   {plan.cached / max(1, plan.sentences):.0%}")
    rejected = ", ".join(f"{reason} {count:,}" for reason, count in plan.rejected.items()) or "none"
    say(f"  rejected             {sum(plan.rejected.values()):>12,}   {rejected}")
    say(f"  teacher tokens       {plan.source_tokens:>12,}   measured {plan.teacher_sentences_per_second:,.0f} sentences/s")
    rate = f"{plan.training_steps:,} steps; measured {plan.student_tokens_per_second:,.0f} tokens/s"
    say(f"  training tokens      {plan.training_tokens:>12,}   {rate}")
    say(f"  seen per epoch       {round(sum(plan.seen.values())):>12,}   texts: {_shares(plan.seen)}")
    say(f"  arithmetic           {plan.arithmetic}")
    say(f"  disk                 {megabytes(disk_bytes(plan)):>12}   vectors, shards, checkpoints")
    parts = f"embed {duration(plan.embed_seconds)}, train {duration(plan.train_seconds)}"
    say(f"  time                 {duration(plan.embed_seconds + plan.train_seconds):>12}   {parts}")


def _shares(counts: Mapping[str, float]) -> str:
    total = max(1, sum(counts.values()))
    return ", ".join(f"{name} {count / total:.0%}" for name, count in sorted(counts.items(), key=lambda entry: -entry[1]))


def write(recipe: Recipe, plan: Plan) -> None:
    """Keep the plan in the run's folder."""
    files.write_json(f"{recipe.folder}/plan.json", asdict(plan))
