"""Published archives: find them in a folder or download them, check their digests, and read them."""

import tarfile
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

from snnfuse.data.optional import require


class Archive(NamedTuple):
    """A published file: its name, its digest ("md5:..." or "sha256:..."), its address, and what it unpacks to.

    The digest is "" if none is published: for a folder of a repository, or a table of your own.
    `direct` is False if the address is a web page on which a person must accept terms first.
    """

    file: str
    digest: str
    url: str
    unpacked: str = ""
    direct: bool = True


class Missing(FileNotFoundError):
    """An archive is not in its folder. The message says how to get it."""


def verify(path: Path, archive: Archive) -> None:
    """Raises ValueError unless the file has the published digest."""
    kind, wanted = archive.digest.split(":")
    got = require("pooch").file_hash(str(path), kind)
    if got != wanted:
        raise ValueError(f"{path}: {kind} {got}, but {archive.file} was published with {wanted}")


def fetch(archive: Archive, folder: Path) -> Path:
    """Downloads to `folder`. The file gets its name after its digest is checked: a broken download leaves nothing."""
    if not archive.direct:
        raise Missing(f"{archive.file} has no direct link: get it from {archive.url} and put it in {folder}")
    pooch = require("pooch")
    download = pooch.HTTPDownloader(timeout=60)
    try:
        path = pooch.retrieve(archive.url, archive.digest, archive.file, folder, downloader=download)
    except ValueError as error:  # pooch's own message names no digest of ours
        raise ValueError(f"{archive.url}: this is not the {archive.file} published with {archive.digest}") from error
    except OSError as error:
        raise Missing(
            f"{archive.file} could not be fetched from {archive.url} ({error}): put it in {folder}"
        ) from error
    return Path(path)


def find(archive: Archive, folder: Path, name: str) -> Path:
    """The archive, verified. If the folder holds what it unpacks to instead, that path."""
    folder = Path(folder)
    if (path := folder / archive.file).exists():
        if archive.digest:
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

    def full(self, name: str) -> str:
        """The name of the file in error messages: with its folder, unless it came out of an archive."""


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

    def full(self, name: str) -> str:
        return name


class _Folder:
    def __init__(self, path: Path, unpacked: bool = False):
        self.path, self.unpacked = path, unpacked

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file())

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def full(self, name: str) -> str:
        return name if self.unpacked else str(self.path / name)


def open_files(path: Path, stack: ExitStack) -> Files:
    """The files of a folder or an archive. A tar has no index, so it is unpacked beside itself until `stack` closes."""
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
    return _Folder(unpacked, unpacked=True)


def open_one(path: Path, stack: ExitStack) -> Path:
    """The single file in a zip, unpacked beside it until `stack` closes. Any other path is returned as it is."""
    if path.suffix != ".zip":
        return path
    with ExitStack() as inner:
        files = _Zip(path, inner)
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=".unpacked-"))
        return Path(files.zip.extract(files.names()[0], folder))
