"""Files on any storage: a local folder, or a URI that pyarrow or fsspec understands (s3://, gs://, abfs://, memory://).

A file is written whole or not at all: locally by temporary name, fsync and rename; on object stores by one upload, which
those stores make visible at once. So a file that exists is complete, and its existence is the marker that resume goes by.
"""

import contextlib
import errno
import functools
import io
import json
import os
import posixpath
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import xxhash

from xdist.errors import Refused

S3_ATTEMPTS = 10  # of a request, with longer and longer pauses: a minute or two

_held: dict[str, IO[bytes]] = {}


class PatientS3(pafs.S3FileSystem):
    """S3 whose requests are made again for a minute or two; pyarrow's own gives up after six seconds of errors, and forgets what it was
    told of retries on its way to another process."""

    def __init__(self, region: str):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
        patient = pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS)
        super().__init__(region=region, endpoint_override=endpoint, retry_strategy=patient)

    def __reduce__(self) -> tuple[Any, ...]:
        return PatientS3, (self.region,)


@functools.lru_cache(maxsize=64)
def _backend(scheme: str, authority: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem, and what it calls the folder at the root of this authority ("" or with a slash behind)."""
    try:
        fs, path = pafs.FileSystem.from_uri(f"{scheme}://{authority}/x")
        return PatientS3(fs.region) if isinstance(fs, pafs.S3FileSystem) else fs, path[:-1]
    except OSError as error:
        raise Refused(f"{scheme}://{authority} cannot be reached: {error}; check its name, the network and your credentials") from None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        import fsspec

        try:
            return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme))), ""
        except (ImportError, ValueError) as error:
            raise Refused(f"storage scheme {scheme}:// is not available: {error}") from None


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """A path or URI as (filesystem, path within it)."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), uri
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        return pafs.LocalFileSystem(), rest
    authority, _, inner = rest.partition("/")
    fs, root = _backend(scheme, authority)
    if isinstance(fs, pafs.PyFileSystem):  # fsspec's own spelling, which some of its file systems insist on
        return fs, fs.handler.fs._strip_protocol(uri)
    return fs, f"{root}{inner}".strip("/")


def is_local(uri: str) -> bool:
    """Whether the path lies on this machine's own file system."""
    return "://" not in uri or uri.startswith("file://")


def exists(uri: str) -> bool:
    """Whether a file is there."""
    fs, path = resolve(uri)
    return fs.get_file_info(path).type == pafs.FileType.File


def size(uri: str) -> int:
    """Bytes of a file, or of all files in a folder."""
    fs, path = resolve(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.Directory:
        return sum(int(inside.size or 0) for inside in fs.get_file_info(pafs.FileSelector(path, recursive=True)))
    return int(info.size or 0)


def names(folder: str, suffix: str = "") -> list[str]:
    """Sorted names of the files directly in a folder that end in `suffix`; none where the folder is missing."""
    return [name for name in _inside(folder, pafs.FileType.File) if name.endswith(suffix) and not name.startswith(".tmp-")]


def folders(folder: str) -> list[str]:
    """Sorted names of the folders directly in a folder; none where it is missing."""
    return _inside(folder, pafs.FileType.Directory)


def _inside(folder: str, kind: pafs.FileType) -> list[str]:
    fs, path = resolve(folder)
    found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(posixpath.basename(info.path.rstrip("/")) for info in found if info.type == kind)


def read(uri: str) -> bytes:
    """A file's bytes. Raises FileNotFoundError."""
    fs, path = resolve(uri)
    with fs.open_input_file(path) as stream:
        return bytes(stream.read())


def open_input(uri: str) -> pa.NativeFile:
    """A file for random access; local files are mapped into memory."""
    fs, path = resolve(uri)
    return pa.memory_map(path) if isinstance(fs, pafs.LocalFileSystem) else fs.open_input_file(path)


def write(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a file whole or not at all. Raises Refused when the disk is full; nothing is left behind then."""
    fs, path = resolve(uri)
    if not isinstance(fs, pafs.LocalFileSystem):
        if folder := posixpath.dirname(path):
            fs.create_dir(folder, recursive=True)
        with fs.open_output_stream(path) as stream:
            stream.write(data)
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".tmp-{name}-{secrets.token_hex(4)}")
    with _room_for(uri):
        try:
            os.makedirs(folder, exist_ok=True)
            with open(temporary, "wb") as local:
                local.write(data)
                local.flush()
                os.fsync(local.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def _room_for(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = (errno.ENOSPC, errno.EDQUOT)
        if error.errno in full or any(os.strerror(code) in str(error) for code in full):  # shutil.Error lists messages alone
            raise Refused(f"the disk is full while writing {uri}; free space or change run.storage, then run again") from None
        raise


def digest(uri: str) -> str:
    """Sixteen hexadecimal digits of a file's content."""
    state = xxhash.xxh3_64()
    with open_input(uri) as stream:
        while block := stream.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def read_json(uri: str) -> Any:
    """A JSON file. Raises FileNotFoundError, and Refused where the file is damaged."""
    try:
        return json.loads(read(uri))
    except ValueError as error:
        raise Refused(f"{uri} is not valid JSON ({error}); delete it and run again") from None


def write_json(uri: str, value: Any) -> None:
    """A JSON file, indented, written whole."""
    write(uri, json.dumps(value, indent=1, ensure_ascii=False).encode())


def write_table(uri: str, table: pa.Table) -> None:
    """A Parquet file, written whole."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write(uri, buffer.getvalue())


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file. Raises Refused where it is damaged."""
    import pyarrow.parquet as pq

    try:
        with open_input(uri) as stream:
            return pq.read_table(stream, columns=columns)
    except pa.ArrowInvalid as error:
        raise Refused(f"{uri} is damaged ({error}); delete it and run again") from None


def remove(uri: str) -> None:
    """Remove a file or folder; nothing happens where there is none."""
    fs, path = resolve(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif info.type == pafs.FileType.File:
        fs.delete_file(path)


def upload(folder: str, uri: str, last: str = "") -> None:
    """Copy a local folder's files to a folder of the storage; a local target changes over in one rename. Elsewhere the file
    named `last` is copied when all others are there, so that its existence says that the folder is whole."""
    fs, path = resolve(uri)
    if not is_local(uri):
        found = [os.path.relpath(os.path.join(parent, name), folder) for parent, _, names in os.walk(folder) for name in names]
        for name in sorted(found, key=lambda name: (name == last, name)):
            fs.create_dir(os.path.dirname(f"{path}/{name}"))
            pafs.copy_files(os.path.join(folder, name), f"{path}/{name}", pafs.LocalFileSystem(), fs)
        return
    token = secrets.token_hex(4)
    temporary, old = f"{path}.tmp-{token}", f"{path}.old-{token}"
    with _room_for(uri):
        try:
            shutil.copytree(folder, temporary, copy_function=_copied)
            if os.path.lexists(path):
                os.replace(path, old)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _copied(source: str, target: str) -> str:
    with open(source, "rb") as inside, open(target, "wb") as outside:
        shutil.copyfileobj(inside, outside)
        outside.flush()
        os.fsync(outside.fileno())
    return target


def hold(uri: str) -> None:
    """Keep a file to this process until it ends, where storage is local. Raises Refused where another process holds it."""
    import fcntl

    if not is_local(uri) or uri in _held:
        return
    path = resolve(uri)[1]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    stream = open(path, "ab")  # noqa: SIM115  (open, and so held, as long as the process lives)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f"{uri} is held by another process that works in this folder; wait for it, or end it") from None
    _held[uri] = stream


def download(uri: str, folder: str) -> str:
    """A folder of the storage as a local folder: itself where it is local, else copied into `folder`."""
    fs, path = resolve(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        return path
    os.makedirs(folder, exist_ok=True)
    pafs.copy_files(path, folder, source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
    return folder


def local(uri: str) -> str:
    """A folder of the storage on this machine: itself, or a copy that processes share and that is made once for what is there."""
    fs, path = resolve(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        return path
    found = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    content = sorted(f"{info.path} {info.size} {info.mtime_ns}" for info in found)
    folder = os.path.join(tempfile.gettempdir(), "xdist", xxhash.xxh3_64_hexdigest("\n".join([uri, *content]).encode()))
    if not os.path.isdir(folder):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        copy = download(uri, tempfile.mkdtemp(dir=os.path.dirname(folder)))
        try:
            os.rename(copy, folder)
        except OSError:  # another process was first
            shutil.rmtree(copy)
    return folder
