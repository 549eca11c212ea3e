"""Where checkpoints lie, what is refused, and what makes a teacher the same as another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.modules import Dense, Pooling

from xdist import encoder, weights
from xdist.config import Teacher
from xdist.errors import Refused


def test_a_folder_without_weights_is_refused(tmp_path: Path, teacher: str) -> None:
    shutil.copytree(teacher, tmp_path / "st", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(Refused, match="holds no weights"):
        weights.located(Teacher(model=str(tmp_path / "st"), allow_pickle=True))


def test_pickle_is_refused_unless_allowed(tmp_path: Path, teacher: str) -> None:
    shutil.copytree(teacher, tmp_path / "st")
    kept = tmp_path / "st" / "model.safetensors"
    torch.save(load_file(kept), tmp_path / "st" / "pytorch_model.bin")
    kept.unlink()
    with pytest.raises(Refused, match=r"only pickle weights.*teacher\.allow_pickle"):
        weights.located(Teacher(model=str(tmp_path / "st")))
    folder = weights.located(Teacher(model=str(tmp_path / "st"), allow_pickle=True))
    found, wanted = (encoder.load(path, "float32").encode(["the knee"]) for path in (folder, teacher))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_pickled_module_is_refused_unless_allowed(save: Callable[..., str]) -> None:
    folder = Path(save(Pooling(32), Dense(32, 16)))
    dense = folder / "2_Dense"
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    assert weights.located(Teacher(model=str(folder)))
    (dense / "model.safetensors").unlink()
    with pytest.raises(Refused, match="2_Dense is a module with pickle weights"):
        weights.located(Teacher(model=str(folder)))
    assert weights.located(Teacher(model=str(folder), allow_pickle=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "no such folder"),
        ("./nowhere", "no such folder"),
        ("~/nowhere/xdist", "no such folder"),
        ("a/b/c", "no such folder"),
        ("package:no_such_package/model", "no_such_package is not installed"),
        ("package:no.such/model", "no.such is not installed"),
        ("package:torch/no-folder", "torch has no folder 'no-folder'"),
        ("nobody/nothing", r"neither a folder nor reachable on the hub nor in its cache \(LocalEntryNotFoundError\).*HF_HOME"),
        ("not a name", "neither a folder nor reachable"),
    ],
)
def test_a_model_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        weights.located(Teacher(model=name))


# --- the fingerprint ---


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | keys), "utf-8")


def test_the_fingerprint_is_of_contents_not_of_the_place(tmp_path: Path, teacher: str) -> None:
    shutil.copytree(teacher, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("a model card")
    here, there = (weights.fingerprint(Teacher(model=folder), folder, 32) for folder in (teacher, str(tmp_path / "elsewhere")))
    assert here.digest == there.digest
    assert here.model != there.model


def test_the_fingerprint_changes_with_whatever_changes_a_vector(tmp_path: Path, save: Callable[..., str]) -> None:
    folder = Path(save(Pooling(32), Dense(32, 16)))
    settings = Teacher(model=str(folder))

    def digest(**changes: Any) -> str:
        return weights.fingerprint(settings.model_copy(update=changes), str(folder), 16).digest

    found = [digest(), digest(prompt="query: "), digest(max_length=128)]
    kept = load_file(folder / "model.safetensors")
    kept["encoder.layer.0.output.dense.bias"][0] += 1e-3
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    found.append(digest())
    edit(folder / "1_Pooling" / "config.json", pooling_mode="cls")
    found.append(digest())
    edit(folder / "tokenizer.json", normalizer=None)
    found.append(digest())
    kept = load_file(folder / "2_Dense" / "model.safetensors")
    save_file({name: value * 2 for name, value in kept.items()}, folder / "2_Dense" / "model.safetensors")
    found.append(digest())
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    found.append(digest())
    assert len(set(found)) == len(found)
    assert digest() == found[-1]
