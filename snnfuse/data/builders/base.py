"""What our builders have in common: streaming to array_record, shard by shard, and what to do with a bad sample.

A builder lists jobs; a job yields samples when it is called, and only then reads them. tfds writes into a folder of
another name and renames it at the end, so that a preparation that fails leaves nothing behind.
"""

import abc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from snnfuse.data import archives
from snnfuse.data.archives import Archive
from snnfuse.data.events import BadSample, Events, Sensor, Unsorted, check

Sample = tuple[str, dict]  # its name, for errors, and its features
Job = Callable[[], Iterable[Sample]]

BAD = ("raise", "skip")
UNSORTED = ("raise", "sort", "skip")


def column(dtype, shape=(None,)):
    """A feature stored as the bytes of an array: 1 byte for a uint8, where tfds by itself takes 1 or 2 for any integer."""
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES)


class StreamingBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """A tfds builder of `_jobs`. On disk in the order of the jobs; shuffling is the loader's.

    `on_bad`: "raise" the fault, naming the sample, or "skip" and count it. `info.metadata` keeps what was done.
    """

    VERSION = tfds.core.Version("1.0.0")
    ARCHIVES: tuple[Archive, ...] = ()
    JOBS_PER_SHARD = 500

    def __init__(self, *, on_bad: str = "raise", on_unsorted: str = "raise", **kwargs):
        for name, value, choices in (("on_bad", on_bad, BAD), ("on_unsorted", on_unsorted, UNSORTED)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}; got {value!r}")
        self.on_bad, self.on_unsorted = on_bad, on_unsorted
        super().__init__(**{"file_format": "array_record"} | kwargs)

    @abc.abstractmethod
    def _jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        """Jobs by split. `paths` are the archives by file name; what must stay open meanwhile goes on `stack`."""

    def _describe(self, features: dict, **metadata) -> tfds.core.DatasetInfo:
        homepage = self.ARCHIVES[0].url if self.ARCHIVES else None
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage=homepage,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(metadata),
            disable_shuffling=True,
        )

    def _info(self) -> tfds.core.DatasetInfo:
        raise NotImplementedError

    def _download_and_prepare(self, dl_manager, download_config=None):
        manual = download_config and download_config.manual_dir
        folder = Path(manual or self.data_dir_root / "downloads" / "manual") / self.name
        self._skipped, self._sorted = [], []
        with ExitStack() as self._stack:
            self._paths = {archive.file: archives.find(archive, folder, self.name) for archive in self.ARCHIVES}
            super()._download_and_prepare(dl_manager, download_config)
        for what, names in (("skipped", self._skipped), ("sorted", self._sorted)):
            self.info.metadata[what] = {"count": len(names), "first": names[:20]}

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list[Callable[[], Iterator]]]:
        shards = {}
        for split, jobs in self._jobs(self._paths, self._stack).items():
            if not jobs:
                raise ValueError(
                    f"{self.name}: nothing for split {split!r} in {[str(p) for p in self._paths.values()]}"
                )
            starts = range(0, len(jobs), self.JOBS_PER_SHARD)
            shards[split] = [partial(self._run, split, jobs[i : i + self.JOBS_PER_SHARD], i) for i in starts]
        return shards

    def _run(self, split: str, jobs: list[Job], start: int) -> Iterator[tuple[int, dict]]:
        for number, job in enumerate(jobs, start):
            samples = iter(job())
            while True:
                try:
                    name, features = next(samples)
                    yield number, self._sound(split, name, features)
                except StopIteration:
                    break
                except BadSample as fault:
                    if self.on_bad == "raise" and not (isinstance(fault, Unsorted) and self.on_unsorted == "skip"):
                        raise
                    self._skipped.append(str(fault))

    def _sound(self, split: str, name: str, features: dict) -> dict:
        return features


class EventBuilder(StreamingBuilder, skip_registration=True):
    """Recordings: `events` in columns, `start` the microsecond that their t counts from, `label`, and `EXTRA` integers.

    t is uint32, x and y one byte where the sensor has no more than 256 of them, p a byte: 7 bytes an event.
    """

    SENSOR: Sensor
    LABELS: tuple[str, ...] | int
    EXTRA: tuple[str, ...] = ()

    def _info(self) -> tfds.core.DatasetInfo:
        dtypes = {"t": np.uint32, "p": np.bool_}
        for name, size in (("x", self.SENSOR.width), ("y", self.SENSOR.height)):
            dtypes[name] = np.uint8 if size <= 256 else np.uint16
        labels = {"num_classes": self.LABELS} if isinstance(self.LABELS, int) else {"names": list(self.LABELS)}
        features = {
            "events": {name: column(dtypes[name]) for name in self.SENSOR.columns},
            "start": tfds.features.Scalar(np.int64),
            "label": tfds.features.ClassLabel(**labels),
        }
        features |= {name: tfds.features.Scalar(np.int64) for name in self.EXTRA}
        return self._describe(features, sensor=list(self.SENSOR), unit="microseconds")

    def _download_and_prepare(self, dl_manager, download_config=None):
        self._totals = {}
        super()._download_and_prepare(dl_manager, download_config)
        self.info.metadata["totals"] = self._totals

    def _sound(self, split: str, name: str, features: dict) -> dict:
        events = self._checked(name, features["events"], features.setdefault("start", 0))
        totals = self._totals.setdefault(split, {"events": 0, "microseconds": 0})
        totals["events"] += len(events["t"])
        totals["microseconds"] += int(events["t"][-1])
        dtypes = {name: feature.np_dtype for name, feature in self.info.features["events"].items()}
        return features | {"events": {name: events[name].astype(dtype) for name, dtype in dtypes.items()}}

    def _checked(self, name: str, events: Events, start: int) -> Events:
        try:
            check(events, self.SENSOR, name)
        except Unsorted as fault:
            if self.on_unsorted != "sort":
                raise Unsorted(name, f"{fault.why} (on_unsorted='sort' sorts it)") from None
            order = np.argsort(events["t"], kind="stable")
            events = {column: values[order] for column, values in events.items()}
            self._sorted.append(str(fault))
        t = events["t"].astype(np.int64) - start
        if t[0] < 0 or t[-1] >= 2**32:
            raise BadSample(name, f"times {t[0]}..{t[-1]} after {start} microseconds do not fit 32 bits")
        return events | {"t": t}
