"""Preparing a data set with tfds: samples stream to array_record files, one shard after the other.

tfds writes into a folder of another name and renames it at the end, so a preparation that fails leaves nothing behind.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path

import tensorflow_datasets as tfds

from snnfuse.data import archives
from snnfuse.data.builders.base import DataSet, Job
from snnfuse.data.events import BadSample, Unsorted

BAD = ("raise", "skip")
UNSORTED = ("raise", "sort", "skip")


class StreamingBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """The tfds builder of a data set. Samples lie on disk in the order of the jobs; the loader shuffles.

    `on_bad` says what to do with a sample that is not sound: "raise" the fault, which names the sample, or "skip" it and
    count it. `on_unsorted` says the same for times that go back, which can also be "sort"ed; None does as `on_bad`.
    `info.metadata` keeps how many samples were skipped and sorted.
    """

    VERSION = tfds.core.Version("1.0.0")
    DATA_SET: type[DataSet]

    def __init__(self, *, on_bad: str = "raise", on_unsorted: str | None = None, **kwargs):
        on_unsorted = on_bad if on_unsorted is None else on_unsorted
        for name, value, choices in (("on_bad", on_bad, BAD), ("on_unsorted", on_unsorted, UNSORTED)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}; got {value!r}")
        self.on_bad, self.on_unsorted = on_bad, on_unsorted
        self.data_set = self.DATA_SET()
        super().__init__(**{"file_format": "array_record"} | kwargs)

    def __reduce__(self):
        return _rebuilt, (self.DATA_SET, self.__getstate__())

    def _info(self) -> tfds.core.DatasetInfo:
        made, labels = self.data_set, self.data_set.label_names
        label = {"names": labels} if labels else {"num_classes": made.classes()}
        features = {name: _feature(spec) for name, spec in made.features().items()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(made).__doc__,
            homepage=(made.ARCHIVES[0].url or None) if made.ARCHIVES else None,
            features=tfds.features.FeaturesDict(features | {"label": tfds.features.ClassLabel(**label)}),
            metadata=tfds.core.MetadataDict(made.metadata()),
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager, download_config=None):
        manual = download_config and download_config.manual_dir
        folder = Path(manual or self.data_dir_root / "downloads" / "manual") / self.name
        self._skipped, self._sorted, self._totals = [], [], {}
        with ExitStack() as self._stack:
            wanted = self.data_set.ARCHIVES
            self._paths = {archive.file: archives.find(archive, folder, self.name) for archive in wanted}
            super()._download_and_prepare(dl_manager, download_config)
        for what, names in (("skipped", self._skipped), ("sorted", self._sorted)):
            self.info.metadata[what] = {"count": len(names), "first": names[:20]}
        if self._totals:
            self.info.metadata["totals"] = self._totals

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list[Callable[[], Iterator]]]:
        shards = {}
        per_shard = self.data_set.JOBS_PER_SHARD
        for split, jobs in self.data_set.jobs(self._paths, self._stack).items():
            if not jobs:
                found = [str(path) for path in self._paths.values()]
                raise ValueError(f"{self.name}: split {split!r} has no samples in {found}")
            starts = range(0, len(jobs), per_shard)
            shards[split] = [partial(self._run, split, jobs[i : i + per_shard], i) for i in starts]
        if self.data_set.label_names:  # known by now, also where only the archives have them
            self.info.features["label"].names = self.data_set.label_names
        return shards

    def _run(self, split: str, jobs: list[Job], start: int) -> Iterator[tuple[int, dict]]:
        for number, job in enumerate(jobs, start):
            samples = iter(job())
            while True:
                try:
                    name, features = next(samples)
                    sample = self.data_set.checked(name, features, self.on_unsorted, self._sorted)
                except StopIteration:
                    break
                except BadSample as fault:
                    if (self.on_unsorted if isinstance(fault, Unsorted) else self.on_bad) == "raise":
                        raise
                    self._skipped.append(str(fault))
                    continue
                self._count(split, sample)
                yield number, sample

    def _count(self, split: str, sample: dict) -> None:
        if "events" in sample:
            totals, t = self._totals.setdefault(split, {"events": 0, "microseconds": 0}), sample["events"]["t"]
            totals["events"] += len(t)
            totals["microseconds"] += int(t[-1]) if len(t) else 0
        if "audio" in sample:
            totals = self._totals.setdefault(split, {"audio_samples": 0})
            totals["audio_samples"] += len(sample["audio"])
        if "signal" in sample:
            totals = self._totals.setdefault(split, {"signal_steps": 0})
            totals["signal_steps"] += len(sample["signal"])


def _feature(spec):
    """Arrays are stored as their bytes: 1 byte for a uint8, where tfds by itself takes 1 or 2 for any integer."""
    if isinstance(spec, dict):
        return {name: _feature(each) for name, each in spec.items()}
    dtype, shape = spec
    if dtype is str:
        return tfds.features.Text()
    if shape == ():
        return tfds.features.Scalar(dtype)
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES)


@lru_cache
def _builder_class(data_set: type[DataSet]) -> type[StreamingBuilder]:
    parts = {"name": data_set.name, "DATA_SET": data_set, "__doc__": data_set.__doc__, "__module__": __name__}
    return type(data_set.__name__, (StreamingBuilder,), parts, skip_registration=True)


def builder(data_set: type[DataSet], **options) -> StreamingBuilder:
    """The tfds builder of a data set; `options` are the builder's and tfds's own (data_dir, file_format)."""
    return _builder_class(data_set)(**options)


def _rebuilt(data_set, state):
    made = _builder_class(data_set).__new__(_builder_class(data_set))
    made.__setstate__(state)
    return made
