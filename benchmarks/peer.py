"""The peer of training: SentenceTransformerTrainer with MSELoss and the settings of sentence-transformers' make_multilingual.py,
in a process of its own.

    python -m benchmarks.peer MODEL PAIRS STEPS float32|bf16 [OUT]     prints texts/s, seconds and texts; OUT is for the student
"""

import contextlib
import io
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks import floor
from benchmarks.commands import command
from xdist import files
from xdist.config import Recipe
from xdist.corpus import Prepared
from xdist.store import Fingerprint, VectorStore

BATCH, LEARNING_RATE, WARMUP, MAX_LENGTH = 64, 2e-5, 0.1, 128
MISSING = "not measured: accelerate is not installed (pip install 'xdist-ray[bench]')"


@dataclass
class Clock:
    """When each step ended, and how much was done by then."""

    began: float = field(default_factory=time.monotonic)
    ends: list[tuple[float, int, int]] = field(default_factory=list)

    def add(self, sequences: int, tokens: int = 0) -> None:
        """Count a step's texts and tokens."""
        floor.settle()
        last = self.ends[-1] if self.ends else (0.0, 0, 0)
        self.ends.append((time.monotonic(), last[1] + sequences, last[2] + tokens))

    @property
    def seconds(self) -> float:
        """From the start of the first step to the end of the last."""
        return self.ends[-1][0] - self.began

    @property
    def sequences(self) -> int:
        """Texts of all steps."""
        return self.ends[-1][1]

    def rates(self, skip: int = 1) -> tuple[float, float]:
        """Texts and tokens per second, without the first `skip` steps, in which kernels are compiled."""
        (start, *before), (end, *after) = self.ends[skip - 1], self.ends[-1]
        sequences, tokens = ((b - a) / (end - start) for a, b in zip(before, after, strict=True))
        return sequences, tokens


def write_pairs(recipe: Recipe, prepared: Prepared, fingerprint: Fingerprint) -> str:
    """The folder of the run's pairs as the trainer takes them: english, non_english, label (the teacher's vector of the English
    sentence)."""
    from datasets import Dataset

    found: dict[str, list[Any]] = {"english": [], "non_english": [], "label": []}
    store = VectorStore(recipe.run.storage, fingerprint)
    for shard in range(prepared.shards):
        table = files.read_table(f"{recipe.folder}/corpus/{shard:05d}.parquet")
        vectors = store.vectors(prepared.shards, shard, table["hash"].to_numpy()).astype(np.float32)
        for vector, row in zip(vectors, table.to_pylist(), strict=True):
            found["english"] += [row["source"]] * len(row["texts"])
            found["non_english"] += row["texts"]
            found["label"] += [vector] * len(row["texts"])
    Dataset.from_dict(found).save_to_disk(folder := f"{recipe.folder}/pairs")
    return folder


@dataclass(frozen=True)
class Trained:
    """A training that ended: texts per second without the first step; seconds and texts with it."""

    rate: float
    seconds: float
    texts: int


def train(folder: str, pairs: str, steps: int, precision: str, out: str = "") -> Trained:
    """Train the student of a folder in a process as the peer's user has it; with `out`, keep the student there."""
    arguments = ["-m", "benchmarks.peer", folder, pairs, str(steps), precision, *([out] if out else [])]
    rate, seconds, count = command(arguments, plain=True).lines[-1][1].split()
    return Trained(float(rate), float(seconds), int(count))


def _trained(folder: str, pairs: str, steps: int, bf16: bool) -> tuple[Any, Clock]:
    """The student of a folder after so many steps, and its clock; a step reads BATCH pairs, which are twice as many texts."""
    import torch
    from datasets import load_from_disk
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MSELoss
    from transformers import TrainerCallback

    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not clock.ends:
                clock.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.add(2 * BATCH)

    model = SentenceTransformer(folder, local_files_only=True)
    model.max_seq_length = MAX_LENGTH
    nowhere = io.StringIO()  # for its dictionary of results and the bars of its model card
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        arguments = SentenceTransformerTrainingArguments(
            output_dir=scratch, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE, warmup_steps=WARMUP,
            bf16=bf16, save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no", dataloader_drop_last=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        read = load_from_disk(pairs)
        trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=read, loss=MSELoss(model), callbacks=[Watch()])
        trainer.train()
    return model, clock


if __name__ == "__main__":
    student, found = _trained(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "bf16")
    for folder in sys.argv[5:]:
        student.save(folder, create_model_card=False)
    print(found.rates()[0], found.seconds, found.sequences)
