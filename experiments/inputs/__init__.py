"""Data sets by name: those of `snnfuse.data`, and `random`. One is a frozen dataclass of choices with

    sources() -> (train, test)                the samples: `source[i]` and `len(source)`
    measured(train) -> the same               with what it takes from the training samples: the mean of their pixels
    example() -> Frames, Images, Sound, ...   what the loader does with a sample, on the host
    augment(key, batch, targets)              -> the same, changed at random; targets are [B, classes]; training only
    encode(key, batch, T)                     -> [T, B, ...], or `nn.Padded` of it
    classes, labels, note                     how many classes; their names; a remark for every result

`augment` and `encode` run on the device, inside the compiled step.

`python -m snnfuse.data list` says where each comes from. Your own data, prepared under a name, are a data set of that name.
`random` has the shapes of another data set, for timing.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from config import needs
from jax import Array

from inputs.images import Images
from inputs.reading import Batch, Name, Sources
from inputs.recordings import Recordings
from inputs.signals import Signals
from inputs.sound import Audio
from snnfuse.data import catalog
from snnfuse.data.builders.audio import AudioSet
from snnfuse.data.builders.base import EventSet
from snnfuse.data.builders.images import ImageSet
from snnfuse.data.builders.signals import SignalSet

SETS = (*catalog.CATALOG, *catalog.own_names())
OF_EVENTS = tuple(name for name in SETS if issubclass(catalog.data_set(name), EventSet))


@dataclass(frozen=True)
class Random:
    """Random samples like those of another data set, with random labels: they say nothing about learning."""

    name: Name = "random"
    like: str = "mnist"
    """the data set"""
    examples: int = 200
    """samples to train on; half as many are held out"""
    events: Annotated[int, needs(like=OF_EVENTS)] = 4000
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

    @property
    def labels(self) -> list[str]:
        return DATASETS[self.like].labels

    def sources(self) -> Sources:
        rng = np.random.default_rng(0)
        return tuple([self._sample(rng) for _ in range(n)] for n in (self.examples, self.examples // 2))

    def measured(self, train):
        return self

    def _sample(self, rng):
        like, label = catalog.data_set(DATASETS[self.like].name), int(rng.integers(self.classes))
        if issubclass(like, AudioSet):
            return {"audio": rng.integers(-(2**12), 2**12, like.RATE // 2).astype(np.int16), "label": label}
        if issubclass(like, SignalSet):
            return {"signal": rng.normal(0, 1, (400, like.CHANNELS)).astype(np.float32), "label": label}
        if not issubclass(like, EventSet):
            return {"image": rng.integers(0, 256, like.SHAPE, np.uint8), "label": label}
        tops = {"x": like.SENSOR.width, "y": like.SENSOR.height, "p": like.SENSOR.polarities}
        columns = {
            column: rng.integers(0, tops[column], self.events) for column in like.SENSOR.columns if column != "t"
        }
        return {"events": columns | {"t": np.sort(rng.integers(0, 300_000, self.events))}, "label": label}

    def example(self):
        return DATASETS[self.like].example()

    def augment(self, key: Array, batch: Batch, targets: Array) -> tuple[Batch, Array]:
        return DATASETS[self.like].augment(key, batch, targets)

    def encode(self, key: Array, batch: Batch, T: int) -> Array:
        return DATASETS[self.like].encode(key, batch, T)


def _default(name):
    found = catalog.data_set(name)
    kinds = ((EventSet, Recordings), (AudioSet, Audio), (SignalSet, Signals), (ImageSet, Images))
    return next(kind(name) for data_set, kind in kinds if issubclass(found, data_set))


DATASETS = {name: _default(name) for name in SETS} | {
    "mnist5k": Images("mnist5k", shift=2),
    "mnist": Images("mnist", repeat=3),  # three channels, as in the temporal fusion paper
    "nmnist": Recordings("nmnist", channels=3),  # a third, empty channel, as there
    "dvs128_gesture": Recordings("dvs128_gesture", channels=3),
    "speech_commands": Audio("speech_commands", seconds=1.0),
    "synthetic_saccades": Recordings("synthetic_saccades", bins=12, split="time", store="bits"),
}

DATASETS["random"] = Random()
