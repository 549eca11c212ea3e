"""Sentence encoders: load a teacher or student from its folder, and turn texts into unit vectors.

The checkpoint's own sentence-transformers modules do the work (so pooling, projections and prompts are what the
checkpoint says); this module decides arithmetic and attention, cuts batches by tokens, and pools in float32.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from xdist import batching, layers, weights
from xdist.errors import Refused

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Tokens of one forward pass without gradient: on a CPU activations should stay in the cache (with 24 tokens a sentence,
# two cores encoded 654 sentences/s at 2,048, 369 at 4,096, 255 at 16,384), a GPU wants much work at a time.
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}


class Encoder(torch.nn.Module):
    """A sentence-transformers model as (ids, mask) → unit float32 vectors, with token-budget batching for texts."""

    def __init__(self, model: "SentenceTransformer", device: str, dtype: torch.dtype, prompt: str = "", fused: bool = False):
        super().__init__()
        self.model = model.to(device)
        self.fused = fused  # xdist.layers in place of the checkpoint's modules
        self.device, self.dtype, self.prompt = device, dtype, prompt
        self.prompt_length = _prompt_length(model.tokenizer, prompt)
        self.positions = positions(self.body)
        self.dropout = any(isinstance(module, torch.nn.Dropout) and module.p for module in self.body.modules())

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.model.get_embedding_dimension() or 0)

    @property
    def kernels(self) -> str:
        """What computes the layers, in words."""
        return "fused layers" if self.fused else f"{self.body.config._attn_implementation} attention"

    @property
    def body(self) -> Any:
        """The transformer."""
        return self.model[0].auto_model

    def forward(self, ids: Tensor, mask: Tensor, packed: layers.Packed | None = None) -> Tensor:
        """Token ids and mask (batch, length) to unit vectors (batch, dimension), float32; by `packed` weights, if given."""
        if packed:
            hidden = packed.hidden(ids, mask)
        elif self.fused and not (self.training and self.dropout):
            hidden = layers.hidden(self.body, ids, mask)
        else:
            with torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32):
                hidden = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        features: dict[str, Any] = {"token_embeddings": hidden.float(), "attention_mask": mask, "prompt_length": self.prompt_length}
        for module in list(self.model)[1:]:
            features = module(features)
        return torch.nn.functional.normalize(features["sentence_embedding"].float(), dim=-1)

    def tokenize(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids with special tokens, cut off at `max_length` (the model's own limit when not given)."""
        limit = max_length or min(self.model.max_seq_length or self.positions, self.positions)
        found = self.model.tokenizer([self.prompt + text for text in texts], truncation=True, max_length=limit)
        return list(found["input_ids"])

    def encode(
        self,
        texts: Sequence[str],
        batch_tokens: int | None = None,
        done: Callable[[int], None] | None = None,
        max_length: int | None = None,
    ) -> np.ndarray:
        """Texts to unit vectors, float32 (n, dimension), in their order. `done` hears how many texts are finished. Raises
        Refused where the model has fewer positions than `max_length`."""
        refuse_length(max_length or 0, self.positions)
        out = np.empty((len(texts), self.dimension), dtype=np.float32)
        rows = [np.asarray(row) for row in self.tokenize(texts, max_length)] if len(texts) else []
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        budget, pad = batch_tokens or BATCH_TOKENS[self.device.split(":")[0]], self.model.tokenizer.pad_token_id or 0
        finished, training = 0, self.training
        self.eval()
        packed = layers.Packed(self.body) if self.fused else None
        with torch.inference_mode():
            for batch in batching.token_batches(lengths, budget):
                # The last of several batches is filled up: it has the shape of any other with texts of its length.
                count = budget // max(1, int(lengths[batch[0]])) if finished else 0
                ids, mask = batching.padded([rows[index] for index in batch], pad, (count, 0))
                vectors = self(torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device), packed)
                out[batch] = vectors[: len(batch)].cpu().numpy()
                finished += len(batch)
                if done:
                    done(finished)
        self.train(training)
        return out


def positions(body: Any) -> int:
    """How many positions a transformer has a row for; as good as endless where it has no table of positions."""
    for module in body.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):
            return table.num_embeddings - first_position(module)
    return 1 << 30


def first_position(embeddings: Any) -> int:
    """The row of a text's first position: RoBERTa and its kin count from the padding token's id on."""
    padding = getattr(embeddings, "padding_idx", None)
    return padding + 1 if isinstance(padding, int) and not isinstance(embeddings, torch.nn.Embedding) else 0


def refuse_length(limit: int, available: int) -> None:
    """Raises Refused for texts longer than the model has positions."""
    if limit > available:
        raise Refused(f"max_length {limit} is more than the model's {available} positions; lower teacher.max_length or student.max_length")


def _prompt_length(tokenizer: Any, prompt: str) -> int:
    """Tokens of the prompt, for models that pool without it; its closing special token does not count."""
    if not prompt:
        return 0
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def load(folder: str, precision: str = "auto", attention: str = "auto", trust_remote_code: bool = False, prompt: str = "") -> Encoder:
    """An encoder from a local folder (see `weights.located`), on the GPU where there is one; without a prompt, the checkpoint's own
    default prompt stands before each text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = sentence_transformer(folder, chosen_attention(attention, device), trust_remote_code)
    default = model.prompts.get(model.default_prompt_name or "") or ""
    dtype = chosen_dtype(precision, device)
    fused = attention == "auto" and device == "cpu" and dtype == torch.bfloat16 and _fast_bf16() and layers.fits(model[0].auto_model)
    return Encoder(model, device, dtype, prompt or default, fused)


def sentence_transformer(folder: str, attention: str, trust_remote_code: bool = False) -> "SentenceTransformer":
    """The checkpoint as sentence-transformers loads it, without its progress bars, in float32 whatever it was saved in.
    Plain checkpoints get mean pooling."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    options: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.float32}
    if any(weights.modules(folder)[0].glob(weights.SAFE)):
        options["use_safetensors"] = True  # without it, a pickle beside oddly named safetensors would be read
    try:
        model = SentenceTransformer(folder, device="cpu", trust_remote_code=trust_remote_code, model_kwargs=options, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Refused(f"{folder} is not a checkpoint that can be loaded: {error}") from None
    if not hasattr(model[0], "auto_model"):
        raise Refused(f"{folder} is no transformer: its first module is {type(model[0]).__name__}; choose a transformer checkpoint")
    return model


def chosen_dtype(precision: str, device: str) -> torch.dtype:
    """bfloat16 where the hardware computes in it (elsewhere it is far slower than float32), unless told otherwise."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device != "cpu":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _fast_bf16() else torch.float32


def _fast_bf16() -> bool:
    """Whether the CPU computes in bfloat16, and torch has the library that does it."""
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(supported and torch.backends.mkldnn.is_available())


def chosen_attention(attention: str, device: str) -> str:
    """Of the checkpoint's own modules: eager on a CPU, whose sdpa kernel is very slow in backward; sdpa on a GPU."""
    return attention if attention != "auto" else ("eager" if device == "cpu" else "sdpa")
