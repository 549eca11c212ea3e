"""What tests share: a tiny random teacher built offline, a small parallel corpus, and one local Ray."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before ray or a hub library is imported: no token file in the home, no network, few threads.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

import pytest
import ray  # noqa: F401  before xdist imports it for one machine alone: some tests have Rays of several nodes in this process
import yaml

from xdist.config import Cluster, Recipe

MakeRecipe = Callable[..., Recipe]

WORDS = {
    lang: words.split()
    for lang, words in {
        "en": "the patient has pain in left right heart lung knee with fever cough and was treated today severe mild",
        "es": "el paciente tiene dolor en izquierdo derecho corazón pulmón rodilla con fiebre tos y fue tratado hoy grave leve",
        "de": "der patient hat schmerz in linkem rechtem herz lunge knie mit fieber husten und wurde behandelt heute schwer leicht",
    }.items()
}


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Distinct word-by-word parallel sentences in en, es and de, with an id and a label."""
    import random

    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        places = [rng.randrange(len(WORDS["en"])) for _ in range(rng.randint(4, 9))]
        row = {lang: " ".join(words[place] for place in places) for lang, words in WORDS.items()}
        rows.setdefault(row["en"], row | {"id": f"s{len(rows)}", "label": "heart" if 7 in places else "other"})
    return list(rows.values())


def write_tsv(path: Path, rows: list[dict[str, str]]) -> Path:
    """A plain TSV file with a header."""
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_checkpoint(folder: Path, hidden: int = 32, layers: int = 3, plain: bool = False) -> Path:
    """A random BERT with a WordPiece vocabulary of its own: a sentence-transformers folder, or a plain checkpoint."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    text = [row["en"] for row in sentences(300)]
    tokenizer.train_from_iterator(text, trainers.WordPieceTrainer(vocab_size=150, special_tokens=specials, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * hidden, max_position_embeddings=64,
    )  # fmt: skip
    target = folder if plain else folder / "plain"
    body = BertModel(config)
    body.embeddings.word_embeddings.weight.data *= 50  # so that vectors spread: a random transformer's nearly coincide
    body.save_pretrained(target)
    wrapped.save_pretrained(target)
    if not plain:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        modules = [Transformer(str(target), max_seq_length=32), Pooling(hidden), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save(str(folder / "st"), create_model_card=False)
        return folder / "st"
    return target


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of two CPUs for the whole session."""
    from xdist import cluster

    with cluster.connected(Cluster(num_cpus=2)):
        yield


LONG: dict[str, Any] = {  # a run that can be killed on its way
    "train": {"steps": 240, "checkpoint_every": 20, "evaluate_every": 120, "log_every": 5},
    "data": {"shards": 16, "window": 4},
}


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what tests make once for all."""
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def undisturbed(make_recipe: MakeRecipe, ray_cluster: None, once: Path) -> Path:
    """The folder of a LONG run that was left alone."""
    from xdist import pipeline

    recipe = make_recipe(run={"name": "undisturbed", "storage": str(once / "undisturbed")}, **LONG)
    if not Path(recipe.folder, "student").exists():
        pipeline.distill(recipe)
    return Path(recipe.folder)


@pytest.fixture
def make_recipe(tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch) -> MakeRecipe:
    """Make a recipe on a corpus of 400 sentences in en, es and de; keyword arguments replace or add keys of sections."""
    monkeypatch.setattr("xdist.planning.PROBE_SECONDS", 0.2)  # what a plan's estimates take here
    data = tmp_path / "data"
    data.mkdir()
    rows = sentences(480)
    write_tsv(data / "corpus.tsv", rows[:400])
    write_tsv(data / "train.tsv", rows[400:440])
    write_tsv(data / "test.tsv", rows[440:])

    def make(**sections: dict[str, Any]) -> Recipe:
        task = {"name": "topic", "kind": "classification", "train": "train.tsv", "dev": "test.tsv", "test": "test.tsv", "text": "{lang}"}
        translation = {"name": "translation", "kind": "retrieval", "test": "test.tsv", "text": "{lang}", "id": "id"}
        settings: dict[str, dict[str, Any]] = {
            "run": {"name": "tiny", "storage": str(tmp_path / "runs")},
            "data": {
                "root": str(data), "languages": ["es", "de"], "holdout": 10, "shards": 4, "window": 2,
                "corpora": [{"name": "toy", "path": "corpus.tsv", "source": "en", "target": "{lang}", "id": "id"}],
            },
            "teacher": {"model": teacher, "max_length": 32},
            "student": {"vocabulary": "extend", "vocabulary_size": 300, "max_length": 32},
            "train": {"steps": 12, "batch_tokens": 256, "log_every": 2, "checkpoint_every": 4, "evaluate_every": 6, "precision": "float32"},
            "evaluate": {"bootstrap": 20, "tasks": [task, translation]},
            "cluster": {"num_cpus": 2, "cpus_per_worker": 1},
        }  # fmt: skip
        for name, keys in sections.items():
            settings[name] = settings.get(name, {}) | keys
        return Recipe(**settings)

    return make


@pytest.fixture
def save(tmp_path: Path, teacher: str) -> Callable[..., str]:
    """Save a sentence-transformers folder of the tiny body and the modules given."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer

    def make(*modules: Any, **options: Any) -> str:
        folder = tmp_path / f"saved{len(list(tmp_path.iterdir()))}"
        body = Transformer(teacher, max_seq_length=32, **options)
        SentenceTransformer(modules=[body, *modules], device="cpu").save(str(folder), create_model_card=False)
        return str(folder)

    return make


# --- commands that are killed ---


def _heed_ctrl_c() -> None:
    """A shell's background jobs ignore it, and what they start inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def started(command: list[str], log: Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own, with more environment; whatever is left of it is ended by that session's id."""
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True, preexec_fn=_heed_ctrl_c,
            env=os.environ | (env or {}),
        )  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = 400) -> float:
    """Wait for the moment to kill a command; gives the seconds that it took."""
    begun = time.monotonic()
    while not condition():
        assert process.poll() is None, "the command ended before the moment to kill it came"
        assert time.monotonic() < begun + seconds, "the moment to kill it never came"
        time.sleep(0.01)
    return time.monotonic() - begun


def steps(log: Path) -> list[int]:
    """The steps of training that a command has shown."""
    return [int(number.replace(",", "")) for number in re.findall(r"^  step +([\d,]+) of", log.read_text(), re.M)]


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


# --- what runs leave behind ---


def as_file(recipe: Recipe, path: Path) -> Path:
    """The recipe as a YAML file."""
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    return path


def all_hashes(store: Path) -> list[int]:
    """Hashes of all sentences that a store holds."""
    import pyarrow as pa

    found: list[int] = []
    for path in store.glob("*/*.arrow"):
        found += pa.ipc.open_file(path).read_all()["hash"].to_pylist()
    return found


def weights(run: Path) -> dict[str, Any]:
    """The student's weights."""
    from safetensors.numpy import load_file

    return dict(load_file(run / "student" / "model.safetensors"))


def assert_equal_weights(one: Path, other: Path) -> None:
    """Two runs' students are the same, to the bit."""
    found = weights(one), weights(other)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert (value == found[1][name]).all(), name
