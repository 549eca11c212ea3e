"""Runs on the demo's natural sentences, ready to train: prepared, embedded and cut into shards by the project's own stages."""

from typing import Any

import yaml

from benchmarks.measure import Options
from benchmarks.texts import DEMO, LANGUAGES
from xdist import cluster, corpus, embed, encoder, recipes, shards, student, weights
from xdist.config import Recipe
from xdist.corpus import Prepared
from xdist.store import Fingerprint


def recipe(options: Options, name: str, **sections: dict[str, Any]) -> Recipe:
    """Training as the demo trains, on a student of all the teacher's layers and tokens. English is seen once with each translation, as
    SentenceTransformerTrainer sees it, so both sides read the same texts equally often. Keyword arguments add keys of sections."""
    sentences: dict[str, Any] = {
        "name": "sentences",
        "path": "sentences.tsv",
        "source": "en",
        "target": "{lang}",
        "where": {"split": "train"},
    }
    if options.quick:
        sentences["max_rows"] = 200
    settings: dict[str, Any] = {
        "run": {"name": name, "storage": str(options.folder / "runs")},
        "data": {"root": str(DEMO), "languages": list(LANGUAGES[1:]), "corpora": [sentences], "holdout": 0, "source_weight": 3.0},
        "teacher": {"model": options.model},
        "student": {"vocabulary": "keep"},
        "train": {"steps": 60, "batch_tokens": 4096, "lr": 4e-4, "log_every": 10, "evaluate_every": 10**6, "checkpoint_every": 10**6},
    }
    for section, keys in sections.items():
        settings[section] = settings.get(section, {}) | keys
    return recipes.check(settings, "benchmarks")


def make(wanted: Recipe) -> tuple[Prepared, Fingerprint]:
    """All that training reads."""
    with cluster.connected(wanted.cluster):
        prepared = corpus.prepare(wanted)
        folder = weights.located(wanted.teacher)
        fingerprint = weights.fingerprint(wanted.teacher, folder, encoder.load(folder).dimension)
        initial = student.build(wanted, folder, prepared)
        embed.embed(wanted, prepared, fingerprint)
        shards.cut(wanted, prepared, fingerprint, initial)
    return prepared, fingerprint


def written(wanted: Recipe, options: Options) -> str:
    """The recipe as a file, for a command."""
    path = options.folder / f"{wanted.run.name}.yaml"
    path.write_text(yaml.safe_dump(wanted.model_dump(mode="json")), encoding="utf-8")
    return str(path)


def stub_teacher(options: Options, width: int = 32) -> str:
    """A folder with a random BERT of one narrow layer and the model's tokenizer: a teacher that costs hardly anything."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel

    base = encoder.sentence_transformer(weights.located(recipe(options, "stub").teacher), "eager")
    sizes: Any = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 2 * width}
    plain, whole = str(options.folder / "plain"), str(options.folder / "stub")
    BertModel(BertConfig(vocab_size=len(base.tokenizer), **sizes)).save_pretrained(plain)
    base.tokenizer.save_pretrained(plain)
    SentenceTransformer(modules=[Transformer(plain), Pooling(width), Normalize()], device="cpu").save(whole, create_model_card=False)
    return whole
