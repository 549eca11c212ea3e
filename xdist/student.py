"""Build the student: a checkpoint, or the teacher's own layers, with a vocabulary that fits the corpus.

Reads the base checkpoint and the prepared corpus, writes <run>/initial/: a sentence-transformers folder, untrained. Its
vectors are unit length and as long as the teacher's; where the base's are not, a linear projection (Dense) is added.
"""

import copy
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from xdist import encoder, files, text, vocabulary, weights
from xdist.config import Recipe
from xdist.corpus import Prepared
from xdist.errors import Refused
from xdist.progress import say

MOST_SENTENCES = 400_000  # read for a vocabulary; more changes no vocabulary noticeably
MOST_ALIGNED = 100_000  # pairs per language that word alignment reads


def build(recipe: Recipe, teacher_folder: str, prepared: Prepared) -> str:
    """The untrained student's folder; built once per run."""
    uri = f"{recipe.folder}/initial"
    if files.exists(f"{uri}/modules.json"):
        return uri
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    folder = weights.of_student(recipe, teacher_folder)
    base = encoder.sentence_transformer(folder, "eager", recipe.teacher.trust_remote_code)
    body: Any = base[0].auto_model
    tokenizer: Any = base.tokenizer
    dimension = _dimension(recipe, teacher_folder)
    encoder.refuse_length(recipe.student.max_length, encoder.positions(body))
    if not tokenizer.is_fast:
        raise Refused(f"{folder} has no tokenizer.json, only a slow tokenizer; save it with a fast one")
    say(f"student   from {recipe.student.base}, vocabulary: {recipe.student.vocabulary}")
    if recipe.student.layers is not None:
        keep_layers(body, recipe.student.layers)
    if recipe.student.vocabulary == "keep":
        tokenizer = _wrapped(tokenizer, tokenizer.backend_tokenizer)
    else:
        tokenizer = _fit_vocabulary(recipe, body, tokenizer, prepared)
    set_dropout(body, recipe.student.dropout)
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as whole:
        body.save_pretrained(plain)
        tokenizer.save_pretrained(plain)
        trusted: Any = {"trust_remote_code": recipe.teacher.trust_remote_code}
        transformer = Transformer(
            plain, max_seq_length=recipe.student.max_length, model_kwargs=trusted, config_kwargs=trusted, processor_kwargs=trusted
        )
        modules = [copy.deepcopy(module) for module in list(base)[1:] if not isinstance(module, Normalize)]
        if not any(isinstance(module, Pooling) for module in modules):
            modules.insert(0, Pooling(body.config.hidden_size))
        out = next(module.get_embedding_dimension() for module in reversed(modules) if isinstance(module, Pooling | Dense))
        if out != dimension:
            torch.manual_seed(recipe.run.seed)
            modules.append(Dense(out, dimension, bias=False, activation_function=nn.Identity()))
        model = SentenceTransformer(modules=[transformer, *modules, Normalize()], device="cpu")
        model.save(os.path.join(whole, "initial"), create_model_card=False)  # a folder that others may read, unlike a temporary one
        files.upload(os.path.join(whole, "initial"), uri, last="modules.json")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"          {body.config.num_hidden_layers} layers, {len(tokenizer):,} tokens, {parameters / 1e6:.1f} M parameters")
    return uri


def _dimension(recipe: Recipe, teacher_folder: str) -> int:
    """Length of the teacher's vectors, which the student's are to have. Raises Refused for prefixes that are no shorter."""
    dimension = int(encoder.sentence_transformer(teacher_folder, "eager", recipe.teacher.trust_remote_code).get_embedding_dimension() or 0)
    longest = max(recipe.train.matryoshka, default=0)
    if longest >= dimension:
        raise Refused(f"train.matryoshka: {longest} is no prefix of vectors of length {dimension}; take lengths below that")
    return dimension


def keep_layers(body: Any, layers: list[int]) -> None:
    """Drop all transformer layers but these. Raises Refused for a layer that is not there."""
    count = body.config.num_hidden_layers
    if not layers or any(not 0 <= layer < count for layer in layers) or sorted(set(layers)) != layers:
        raise Refused(f"student.layers: {layers} must be rising numbers between 0 and {count - 1}: the base has {count} layers")
    for parent in body.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                setattr(parent, name, nn.ModuleList(child[layer] for layer in layers))
                if getattr(body.config, "layer_types", None):
                    body.config.layer_types = [body.config.layer_types[layer] for layer in layers]
                body.config.num_hidden_layers = len(layers)
                return
    raise Refused(f"student.layers: {type(body).__name__} has no list of {count} layers; leave student.layers out")


def set_dropout(body: Any, rate: float) -> None:
    """The same dropout everywhere in the body, kept in its configuration."""
    for key, value in body.config.to_dict().items():
        if "dropout" in key and isinstance(value, float | int):  # hidden_dropout_prob, attention_dropout, …
            setattr(body.config, key, rate)
    for module in body.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def _fit_vocabulary(recipe: Recipe, body: Any, tokenizer: Any, prepared: Prepared) -> Any:
    old, kind, size = tokenizer.backend_tokenizer, recipe.student.vocabulary, recipe.student.vocabulary_size
    table = body.get_input_embeddings().weight.detach().numpy()
    sources, translations = _sample(recipe, prepared)
    others = {lang: [text for _, text in pairs] for lang, pairs in translations.items()}
    everything = [*sources, *(text for texts in others.values() for text in texts)]
    if kind == "trim":
        fitted = vocabulary.trim(old, everything)
    elif kind == "extend":
        fitted = vocabulary.extend(old, sources, others, size)
    else:
        fitted = vocabulary.train(everything, size, _specials(tokenizer))
        old_of = {fitted.tokenizer.token_to_id(token): tokenizer.convert_tokens_to_ids(token) for token in _specials(tokenizer).values()}
        for new_id, old_id in old_of.items():
            fitted.old_ids[new_id] = old_id
    aligned = None
    if (fitted.old_ids < 0).any():
        pairs = (([source for source, _ in found[:MOST_ALIGNED]], others[lang][:MOST_ALIGNED]) for lang, found in translations.items())
        aligned = vocabulary.align(pairs, old, fitted.tokenizer, table)
    rows = vocabulary.initial_rows(fitted, old, table, aligned)
    return _install(body, tokenizer, fitted.tokenizer, rows)


def _install(body: Any, tokenizer: Any, fitted: Any, rows: np.ndarray) -> Any:
    """Put a new table and tokenizer in place of the old ones; special tokens keep their names."""
    wrapped = _wrapped(tokenizer, fitted)
    padding = body.get_input_embeddings().padding_idx
    if any(map(encoder.first_position, body.modules())) and wrapped.pad_token_id != tokenizer.pad_token_id:
        raise Refused("student.vocabulary: this base counts positions from its padding token's id, which would change; use keep")
    embeddings = nn.Embedding(rows.shape[0], rows.shape[1], padding_idx=None if padding is None else wrapped.pad_token_id)
    with torch.no_grad():
        embeddings.weight.copy_(torch.from_numpy(rows))
    body.set_input_embeddings(embeddings)
    body.config.vocab_size = len(rows)
    for role in ("pad", "bos", "eos", "cls", "sep"):
        if getattr(body.config, f"{role}_token_id", None) is not None:
            setattr(body.config, f"{role}_token_id", getattr(wrapped, f"{role}_token_id"))
    return wrapped


def _wrapped(tokenizer: Any, backend: Any) -> Any:
    """A tokenizer of the general class, which takes tokenizer.json as it stands. (BertTokenizer, for one, makes itself a
    normaliser of its own, so that a base's lower-casing would be lost.) Special tokens keep their names."""
    from transformers import PreTrainedTokenizerFast

    names: dict[str, Any] = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **names,
    )


def _specials(tokenizer: Any) -> dict[str, str]:
    """Special tokens by role, in the order of their ids, so that a padding token keeps a small id."""
    roles = ("pad", "unk", "cls", "sep", "mask")
    found = {role: getattr(tokenizer, f"{role}_token") for role in roles}
    if None in (found["pad"], found["unk"], found["cls"], found["sep"]):
        raise Refused("student.vocabulary: train needs a base with padding, unknown, class and separator tokens; use trim or keep")
    present = {role: token for role, token in found.items() if token is not None}
    return dict(sorted(present.items(), key=lambda entry: tokenizer.convert_tokens_to_ids(entry[1])))


def _sample(recipe: Recipe, prepared: Prepared) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """Source sentences of the sample to train on, and (source, translation) pairs of each language, from as many shards as
    it takes."""
    sources: list[str] = []
    translations: dict[str, list[tuple[str, str]]] = {lang: [] for lang in recipe.data.languages}
    for source, languages, texts in _groups(recipe, prepared):
        sources.append(source)
        for lang, translation in zip(languages, texts, strict=True):
            translations[lang].append((source, translation))
        if len(sources) >= MOST_SENTENCES:
            break
    return sources, translations


def _groups(recipe: Recipe, prepared: Prepared) -> Iterator[tuple[str, list[str], list[str]]]:
    for shard in range(prepared.shards):
        table = files.read_table(f"{recipe.folder}/corpus/{shard:05d}.parquet", ["hash", "source", "languages", "texts"])
        table = table.filter(pa.array(text.sampled(table["hash"].to_numpy(), recipe.data.sample)))
        yield from zip(*(table[name].to_pylist() for name in ("source", "languages", "texts")), strict=True)
