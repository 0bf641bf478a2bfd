"""Published archives: found in a folder, checked against their published digests, read without unpacking where possible."""

import hashlib
import os
import tarfile
import tempfile
import urllib.request
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol


class Archive(NamedTuple):
    """A file as published: its name, "md5:..." or "sha256:...", where it is, and what it unpacks to.

    Not `direct` where the address is a page, on which a person has to accept something first.
    """

    file: str
    digest: str
    url: str
    unpacked: str = ""
    direct: bool = True


class Missing(FileNotFoundError):
    """Archives that are not where they should be; the message says how to get them."""


def verify(path: Path, archive: Archive) -> None:
    """ValueError unless the file has the published digest. Reads it in pieces."""
    kind, wanted = archive.digest.split(":")
    with open(path, "rb") as file:
        got = hashlib.file_digest(file, kind).hexdigest()
    if got != wanted:
        raise ValueError(f"{path}: {kind} {got}, but {archive.file} was published with {wanted}")


def fetch(archive: Archive, folder: Path) -> Path:
    """Downloads to `folder`, and verifies before the file gets its name: a broken download leaves nothing."""
    if not archive.direct:
        raise Missing(f"{archive.file} has no direct link: get it from {archive.url} and put it in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{archive.file}.part"
    try:
        with urllib.request.urlopen(archive.url, timeout=60) as reply, open(part, "wb") as file:
            while piece := reply.read(1 << 20):
                file.write(piece)
        verify(part, archive)
        os.replace(part, folder / archive.file)
        return folder / archive.file
    except OSError as error:
        raise Missing(
            f"{archive.file} could not be fetched from {archive.url} ({error}): put it in {folder}"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def find(archive: Archive, folder: Path, name: str) -> Path:
    """The archive, verified; or the folder or file that it unpacks to, if that stands there instead."""
    folder = Path(folder)
    if (path := folder / archive.file).exists():
        verify(path, archive)
        return path
    if archive.unpacked and (folder / archive.unpacked).exists():
        return folder / archive.unpacked
    how = f"python -m snnfuse.data prepare {name} --download" if archive.direct else f"get it from {archive.url}"
    raise Missing(f"{name} needs {archive.file} in {folder}: {how}")


class Files(Protocol):
    """Named files of an archive, each read whole."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...


class _Zip:
    def __init__(self, path: Path, stack: ExitStack):
        try:
            self.zip = stack.enter_context(zipfile.ZipFile(path))
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: {error}") from error

    def names(self) -> list[str]:
        return sorted(name for name in self.zip.namelist() if not name.endswith("/"))

    def read(self, name: str) -> bytes:
        return self.zip.read(name)


class _Folder:
    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file())

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


def open_files(path: Path, stack: ExitStack) -> Files:
    """A folder or zip in place; a tar, which has no index, unpacked beside itself for as long as `stack` is open."""
    if path.is_dir():
        return _Folder(path)
    if path.suffix == ".zip":
        return _Zip(path, stack)
    unpacked = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=".unpacked-")))
    try:
        with tarfile.open(path) as tar:
            tar.extractall(unpacked, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: {error}") from error
    return _Folder(unpacked)


def open_one(path: Path, stack: ExitStack) -> Path:
    """The single file in a zip, unpacked beside it for as long as `stack` is open; any other path as it is."""
    if path.suffix != ".zip":
        return path
    with ExitStack() as inner:
        files = _Zip(path, inner)
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=".unpacked-"))
        return Path(files.zip.extract(files.names()[0], folder))
