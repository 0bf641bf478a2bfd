"""Data sets by name: those of `snnfuse.data`, and `random`. One is a frozen dataclass of choices with

    sources() -> (train, test)                the samples: `source[i]` and `len(source)`
    example() -> Frames or Images             what the loader does with a sample, on the host
    encode(key, batch, T, train)              -> [T, B, ...]; runs on the device, inside the step; augments if `train`
    classes, note                             how many classes; a remark for every result

`python -m snnfuse.data list` says where each comes from. `random` has the shapes of another data set, for timing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array, lax
from tqdm import tqdm

from snnfuse.data import archives, catalog, encoders
from snnfuse.data import loader as load
from snnfuse.data.builders.base import EventSet

Name = Annotated[str, tyro.conf.arg(name="data", prefix_name=False, metavar="NAME")]
Sources = tuple[Sequence[dict], Sequence[dict]]


@dataclass(frozen=True)
class Images:
    """Static images, kept in memory and turned into spikes on the device."""

    note: ClassVar[str] = ""
    name: Name
    encoding: str = "bernoulli"
    """bernoulli: each step spikes with probability equal to the pixel value; direct: the pixel value at every step"""
    shift: int = 0
    """training images move by up to this many pixels each way"""
    repeat: int = 1
    """copies of the image, each as its own channels with its own noise"""

    def __post_init__(self):
        if self.encoding not in ("direct", "bernoulli"):
            raise ValueError(f"--data.encoding must be direct or bernoulli; got {self.encoding!r}")
        if self.shift < 0:
            raise ValueError(f"--data.shift must be at least 0 pixels; got {self.shift}")
        if self.repeat < 1:
            raise ValueError(f"--data.repeat must be at least 1; got {self.repeat}")

    @property
    def classes(self) -> int:
        return catalog.data_set(self.name).classes()

    def sources(self) -> Sources:
        train, test = _sources(self.name)
        return in_memory(train, f"{self.name}, train"), in_memory(test, f"{self.name}, test")

    def example(self) -> load.Images:
        return load.Images()

    def encode(self, key: Array, batch: dict[str, Array], T: int, train: bool = False) -> Array:
        noise, place = jax.random.split(key)
        images = moved(place, batch["image"], self.shift) if train and self.shift else batch["image"]
        images = jnp.tile(self.example().unpack(images), self.repeat)
        if self.encoding == "bernoulli":
            return encoders.bernoulli(noise, images, T)
        return encoders.direct(images, T)


@dataclass(frozen=True)
class Recordings:
    """Recordings of events, read from disk and made into frames by the loader."""

    note: ClassVar[str] = ""
    name: Name
    bins: int = 32
    """frames of a recording"""
    split: str = "number"
    """number: every frame has equally many events; time: every frame has the same duration"""
    store: str = "bytes"
    """bytes: frames are counts of events, at most 255; bits: 1 where there was any event"""
    channels: int | None = None
    """channels of a frame, if more than the sensor has polarities; the others stay empty"""

    def __post_init__(self):
        if self.bins < 1:
            raise ValueError(f"--data.bins must be at least 1; got {self.bins}")
        for name, known in (("split", ("number", "time")), ("store", ("bytes", "bits"))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"--data.{name} must be {known[0]} or {known[1]}; got {value!r}")
        polarities = catalog.data_set(self.name).SENSOR.polarities
        if self.channels is not None and self.channels < polarities:
            raise ValueError(f"--data.channels must be at least {polarities}; got {self.channels}")

    @property
    def classes(self) -> int:
        return catalog.data_set(self.name).classes()

    def sources(self) -> Sources:
        return _sources(self.name)

    def example(self) -> load.Frames:
        sensor = catalog.data_set(self.name).SENSOR
        return load.Frames(sensor, self.bins, split=self.split, store=self.store, saturate=True)

    def encode(self, key: Array, batch: dict[str, Array], T: int, train: bool = False) -> Array:
        """Nothing is random here. Steps after the last frame are empty."""
        if T < self.bins:
            raise ValueError(f"--model.T must be at least --data.bins, {self.bins}; got {T}")
        xs = self.example().unpack(batch["frames"])
        empty = 0 if self.channels is None else self.channels - xs.shape[-1]
        return jnp.pad(xs, ((0, T - self.bins), *((0, 0),) * 3, (0, empty)))


@dataclass(frozen=True)
class Random:
    """Random samples like those of another data set, with random labels: they say nothing about learning."""

    name: Name = "random"
    like: str = "mnist"
    """the data set"""
    examples: int = 200
    """samples to train on; half as many are held out"""
    events: int = 4000
    """events of a recording"""
    note: ClassVar[str] = "random input"

    def __post_init__(self):
        if self.like not in DATASETS or self.like == self.name:
            known = ", ".join(name for name in DATASETS if name != self.name)
            raise ValueError(f"--data.like must be one of {known}; got {self.like!r}")
        for name in ("examples", "events"):
            if (value := getattr(self, name)) < 1 + (name == "examples"):
                raise ValueError(f"--data.{name} must be at least {1 + (name == 'examples')}; got {value}")

    @property
    def classes(self) -> int:
        return DATASETS[self.like].classes

    def sources(self) -> Sources:
        rng = np.random.default_rng(0)
        return tuple([self._sample(rng) for _ in range(n)] for n in (self.examples, self.examples // 2))

    def _sample(self, rng):
        like, label = catalog.data_set(DATASETS[self.like].name), int(rng.integers(self.classes))
        if not issubclass(like, EventSet):
            return {"image": rng.integers(0, 256, like.SHAPE, np.uint8), "label": label}
        tops = {"x": like.SENSOR.width, "y": like.SENSOR.height, "p": like.SENSOR.polarities}
        columns = {
            column: rng.integers(0, tops[column], self.events) for column in like.SENSOR.columns if column != "t"
        }
        return {"events": columns | {"t": np.sort(rng.integers(0, 300_000, self.events))}, "label": label}

    def example(self):
        return DATASETS[self.like].example()

    def encode(self, key: Array, batch: dict[str, Array], T: int, train: bool = False) -> Array:
        return DATASETS[self.like].encode(key, batch, T, train)


def moved(key: Array, images: Array, by: int) -> Array:
    """Each image of [B, H, W, C] moved by up to `by` pixels each way; the border is zero."""
    padded = jnp.pad(images, ((0, 0), (by, by), (by, by), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * by + 1)
    return jax.vmap(lambda image, at: lax.dynamic_slice(image, (*at, 0), images.shape[1:]))(padded, corners)


def in_memory(source: Sequence[dict], name: str) -> list[dict]:
    return [source[i] for i in tqdm(range(len(source)), f"{name}: reading", leave=False)]


def _sources(name):
    """The splits train and test. Raises archives.Missing, which says what to get and where to put it."""
    try:
        return tuple(catalog.source(name, split) for split in ("train", "test"))
    except ImportError as e:
        raise archives.Missing(f"{e}, then: python -m snnfuse.data prepare {name}") from e
    except archives.Missing as e:
        folder = catalog.data_dir() / "downloads" / "manual" / name
        files = "; ".join(f"{archive.file} from {archive.url}" for archive in catalog.data_set(name).ARCHIVES)
        raise archives.Missing(f"{e}. It needs, in {folder}: {files}") from e


def _default(name):
    return (Recordings if issubclass(catalog.data_set(name), EventSet) else Images)(name)


DATASETS = {name: _default(name) for name in catalog.CATALOG} | {
    "mnist5k": Images("mnist5k", shift=2),
    "mnist": Images("mnist", repeat=3),  # three channels, as in the temporal fusion paper
    "nmnist": Recordings("nmnist", channels=3),  # a third, empty channel, as there
    "dvs128_gesture": Recordings("dvs128_gesture", channels=3),
    "synthetic_saccades": Recordings("synthetic_saccades", bins=12, split="time", store="bits"),
}
DATASETS["random"] = Random()
