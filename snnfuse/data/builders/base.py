"""What a data set is: a class that says what its samples are, which archives they come from, and how to read them.

A data set lists jobs. A job is a function that yields samples, and it reads nothing before it is called. `streaming.py`
writes the samples to disk with tfds. The classes here need NumPy alone, so that `list` and `--help` work without tfds.
"""

import abc
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from snnfuse.data.archives import Archive
from snnfuse.data.events import BadSample, Events, Sensor, Unsorted, check

Sample = tuple[str, dict]  # its name, for errors, and its features
Job = Callable[[], Iterable[Sample]]
Feature = tuple[
    type, tuple[int | None, ...]
]  # the dtype (str: a text) and the shape; a length of None differs between samples


def first_sound(reads: Iterable[Callable[[], Any]]) -> Any:
    """Call `reads` in turn and return the first result. If every call raises BadSample, raise the first of these errors.

    A set takes the size or the rate of its first file. If that file is broken, the next one says it, and the broken one is
    named, or skipped, when its turn comes.
    """
    faults = []
    for read in reads:
        try:
            return read()
        except BadSample as fault:
            faults.append(fault)
    raise faults[0]


class DataSet(abc.ABC):
    """One data set. The first line of its docstring is what `python -m snnfuse.data list` prints.

    `LABELS` are the names of the classes, or their number where only the archives have the names: `jobs` then sets
    `label_names`. `JOBS_PER_SHARD` jobs make one file on disk.
    """

    name: str
    LABELS: tuple[str, ...] | int
    ARCHIVES: tuple[Archive, ...] = ()
    JOBS_PER_SHARD = 500

    def __init__(self):
        self.label_names = None if isinstance(self.LABELS, int) else list(self.LABELS)

    @classmethod
    def classes(cls) -> int:
        return cls.LABELS if isinstance(cls.LABELS, int) else len(cls.LABELS)

    @abc.abstractmethod
    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        """The jobs of each split. `paths` are the archives by file name; files that must stay open go on `stack`."""

    @abc.abstractmethod
    def features(self) -> dict[str, Feature | dict[str, Feature]]:
        """The features of a sample, all but its label."""

    def metadata(self) -> dict:
        return {}

    def checked(self, name: str, features: dict, on_unsorted: str, was_sorted: list[str]) -> dict:
        """The sample as it is stored. Raises BadSample."""
        label = features["label"]
        if not isinstance(label, str) and not 0 <= label < self.classes():
            raise BadSample(name, f"label {label} is not in 0..{self.classes() - 1}")
        return features


class EventSet(DataSet):
    """Recordings: `events` in columns, `start` (the microsecond at which t is 0), `label`, and the integers in `EXTRA`.

    t is uint32. x and y take one byte if the sensor has at most 256 of them, else two. p takes one byte.
    """

    SENSOR: Sensor
    EXTRA: tuple[str, ...] = ()
    WINDOW: int | None = None  # microseconds of a sample, if recordings are cut into windows

    def features(self) -> dict[str, Feature | dict[str, Feature]]:
        dtypes = {"t": np.uint32, "p": np.bool_}
        for name, size in (("x", self.SENSOR.width), ("y", self.SENSOR.height)):
            dtypes[name] = np.uint8 if size <= 256 else np.uint16
        events = {name: (dtypes[name], (None,)) for name in self.SENSOR.columns}
        return {"events": events, "start": (np.int64, ())} | dict.fromkeys(self.EXTRA, (np.int64, ()))

    def metadata(self) -> dict:
        window = {} if self.WINDOW is None else {"window": self.WINDOW}
        return {"sensor": list(self.SENSOR), "unit": "microseconds"} | window

    def checked(self, name: str, features: dict, on_unsorted: str, was_sorted: list[str]) -> dict:
        features = super().checked(name, features, on_unsorted, was_sorted)
        events = self._events(name, features["events"], features.setdefault("start", 0), on_unsorted, was_sorted)
        dtypes = self.features()["events"]
        return features | {"events": {column: events[column].astype(dtype) for column, (dtype, _) in dtypes.items()}}

    def _events(self, name, events: Events, start: int, on_unsorted: str, was_sorted: list[str]) -> Events:
        try:
            events = check(events, self.SENSOR, name)
        except Unsorted as fault:
            if on_unsorted != "sort":
                raise Unsorted(name, f"{fault.why} (on_unsorted='sort' sorts it)") from None
            events = check(events, self.SENSOR, name, on_unsorted="sort")
            was_sorted.append(str(fault))
        t = events["t"].astype(np.int64) - start
        if len(t) and (t[0] < 0 or t[-1] >= 2**32):
            raise BadSample(name, f"times {t[0]}..{t[-1]} after {start} microseconds do not fit 32 bits")
        return events | {"t": t}
