"""Files whole or not at all, on a local disk, a full disk and an fsspec storage."""

import errno
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import xxhash

from xdist import files
from xdist.errors import Refused


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"local": str(tmp_path / "a"), "file": f"file://{tmp_path}/a", "memory": f"memory://{uuid.uuid4().hex}"}[request.param]


def test_written_bytes_come_back(folder: str) -> None:
    files.write(f"{folder}/deep/one.bin", b"\0\1")
    assert files.read(f"{folder}/deep/one.bin") == b"\0\1"
    assert files.exists(f"{folder}/deep/one.bin")
    assert not files.exists(f"{folder}/deep")
    assert files.size(f"{folder}/deep/one.bin") == 2
    assert files.names(f"{folder}/deep") == ["one.bin"]
    assert files.names(f"{folder}/none") == []


def test_a_folder_is_as_large_as_its_files(folder: str) -> None:
    files.write(f"{folder}/a/one", b"123")
    files.write(f"{folder}/a/b/two", b"4567")
    assert files.size(f"{folder}/a") == 7
    assert files.size(f"{folder}/missing") == 0


def test_names_are_sorted_and_filtered(folder: str) -> None:
    for name in ("b.json", "a.json", "c.txt"):
        files.write(f"{folder}/{name}", b"")
    assert files.names(folder, ".json") == ["a.json", "b.json"]


@pytest.mark.parametrize("name", ["a#b", "a?b=c", "a%20b", "a b", "ñandú", "a;b"])
def test_signs_in_names_are_part_of_the_name(folder: str, name: str) -> None:
    files.write(f"{folder}/{name}.json", b"{}")
    assert files.names(folder) == [f"{name}.json"]
    assert files.read_json(f"{folder}/{name}.json") == {}


def test_remove_takes_files_and_folders_and_nothing(folder: str) -> None:
    files.write(f"{folder}/x/one", b"1")
    files.remove(f"{folder}/x")
    files.remove(f"{folder}/x")
    assert not files.exists(f"{folder}/x/one")


def test_tables_round_trip_and_damage_is_refused(folder: str) -> None:
    files.write_table(f"{folder}/t.parquet", pa.table({"a": [1, 2], "b": ["x", "y"]}))
    assert files.read_table(f"{folder}/t.parquet", ["b"]).to_pydict() == {"b": ["x", "y"]}
    files.write(f"{folder}/t.parquet", files.read(f"{folder}/t.parquet")[:-20])
    with pytest.raises(Refused, match=r"t\.parquet is damaged"):
        files.read_table(f"{folder}/t.parquet")


def test_damaged_json_is_refused_by_name(folder: str) -> None:
    files.write(f"{folder}/x.json", b"{")
    with pytest.raises(Refused, match=r"x\.json is not valid JSON"):
        files.read_json(f"{folder}/x.json")


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("abfs://box@account.dfs.core.windows.net/a/b", "box/a/b"),
        ("gs://anonymous@bucket/a/b", "bucket/a/b"),
        ("memory://bucket/a/b", "/bucket/a/b"),
        ("file:///a/b", "/a/b"),
    ],
)
def test_paths_are_as_the_filesystem_spells_them(uri: str, path: str) -> None:
    assert files.resolve(uri)[1] == path


def test_a_file_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    uri = f"{tmp_path}/run/lock"
    program = f"from xdist import files; files.hold({uri!r}); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(Refused, match=r"run/lock is held by another process"):
            files.hold(uri)
        other.kill()
    files.hold(uri)
    files.hold(uri)  # our own already


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(Refused, match="nosuch://"):
        files.read("nosuch://bucket/x")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int) -> None:
    path = tmp_path / "shard.arrow"
    files.write(str(path), b"old")

    def full(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(Refused, match=r"disk is full while writing .*shard\.arrow; free space"):
        files.write(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["shard.arrow"]


def test_other_errors_keep_their_name_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write(str(tmp_path / "x"), b"new")
    assert os.listdir(tmp_path) == []


def test_a_real_full_disk(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a").write_bytes(b"x" * 100_000)
    with pytest.raises(Refused, match="disk is full"), files._room_for("x"), open("/dev/full", "wb") as stream:
        stream.write(b"x" * 100_000)


def folder_of(path: Path, **content: str) -> Path:
    path.mkdir()
    for name, text in content.items():
        (path / name).write_text(text)
    return path


def test_upload_changes_a_folder_over(tmp_path: Path, folder: str) -> None:
    first, second = folder_of(tmp_path / "1", a="1", b="1"), folder_of(tmp_path / "2", a="2")
    files.upload(str(first), f"{folder}/student")
    files.upload(str(second), f"{folder}/student")
    assert files.read(f"{folder}/student/a") == b"2"
    if files.is_local(folder):
        assert files.names(f"{folder}/student") == ["a"]
        assert os.listdir(folder.removeprefix("file://")) == ["student"]


def test_an_upload_copies_the_marker_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On remote storage, a folder whose upload was cut off has no marker yet."""
    source = folder_of(tmp_path / "student", a="1", modules="2", z="3")
    (source / "inner").mkdir()
    (source / "inner" / "modules").write_text("4")
    monkeypatch.setattr(files, "is_local", lambda _: False)
    copied, copy = [], files.pafs.copy_files
    monkeypatch.setattr(files.pafs, "copy_files", lambda *args: (copied.append(os.path.relpath(args[0], source)), copy(*args)))
    files.upload(str(source), str(tmp_path / "there"), last="modules")
    assert sorted(copied) == ["a", "inner/modules", "modules", "z"]
    assert copied[-1] == "modules"
    assert (tmp_path / "there" / "inner" / "modules").read_text() == "4"


def test_an_upload_to_a_full_disk_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    old, new = folder_of(tmp_path / "old", a="1"), folder_of(tmp_path / "new", a="2")
    target = tmp_path / "runs" / "student"
    files.upload(str(old), str(target))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(Refused, match="disk is full"):
        files.upload(str(new), str(target))
    assert (target / "a").read_text() == "1"
    assert os.listdir(tmp_path / "runs") == ["student"]


def test_download_copies_what_is_not_local(tmp_path: Path, folder: str) -> None:
    files.write(f"{folder}/student/modules.json", b"[]")
    local = files.download(f"{folder}/student", str(tmp_path / "copy"))
    assert Path(local, "modules.json").read_bytes() == b"[]"


def test_local_is_the_folder_itself_or_one_place_per_uri(tmp_path: Path) -> None:
    assert files.local(str(tmp_path)) == str(tmp_path)
    files.write("memory://bucket/student/modules.json", b"[]")
    found = Path(files.local("memory://bucket/student"))
    assert (found / "modules.json").read_bytes() == b"[]"
    assert files.local("memory://bucket/student") == str(found)
    shutil.rmtree(found)


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    for name, content in (("a", b"x" * 5_000_000), ("b", b"x" * 5_000_000), ("c", b"x" * 4_999_999 + b"y")):
        (tmp_path / name).write_bytes(content)
    digests = [files.digest(str(tmp_path / name)) for name in "abc"]
    assert digests[0] == digests[1] == xxhash.xxh3_64_hexdigest(b"x" * 5_000_000)
    assert digests[2] != digests[0]
