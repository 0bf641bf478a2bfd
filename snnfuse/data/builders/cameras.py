"""Recordings of event cameras, cut into samples: objects before a DVS128, and any folder of recordings with a table of labels."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from snnfuse.data import formats
from snnfuse.data.archives import Archive
from snnfuse.data.augment import keep
from snnfuse.data.builders.base import EventSet, Feature, Job, Sample, first_sound
from snnfuse.data.builders.table import TABLE, Row, TableSet, own, read_table
from snnfuse.data.events import BadSample, Events, Sensor, check


def windows(events: Events, start: int, stop: int, length: int) -> Iterator[tuple[int, Events]]:
    """(the time at which it starts, its events) of each whole window of `length` microseconds in [start, stop)."""
    edges = np.arange(start, stop - length + 1, length)
    begin, end = np.searchsorted(events["t"], edges), np.searchsorted(events["t"], edges + length)
    for at, i, j in zip(edges, begin, end, strict=True):
        yield int(at), keep(events, slice(i, j))


class EventFolder(TableSet, EventSet):
    """Your own recordings of events: .npz files (t, x, y, p) or .aedat files, and a table split.csv of their labels."""

    JOBS_PER_SHARD = 50

    @classmethod
    def of(
        cls, name: str, folder: Path, size: tuple[int, int] | None = None, window: float | None = None
    ) -> type["EventFolder"]:
        """The data set of a folder: labels and further columns are those of its table.

        `size` (H, W) is that of the camera; a DVS128, which AEDAT 2.0 is read of, has 128 x 128. `window`, in milliseconds,
        cuts each recording into samples of that duration; what is left at its end is left out.
        """
        rows = read_table(folder / TABLE)
        first = first_sound(partial(row.path, folder) for row in rows)
        if size is None and not first.read_bytes()[:12] == b"#!AER-DAT2.0":
            raise ValueError(f"size must be the (H, W) of the camera of {first}, such as --size 128; got None")
        if window is not None and not 1 <= window * 1000 < 2**32:
            raise ValueError(f"window must be from 0.001 to {2**32 / 1000:.0f} milliseconds; got {window}")
        if size is not None and not min(size) >= 1:
            raise ValueError(f"size must be (H, W), each at least 1; got {size}")
        length = None if window is None else round(window * 1000)
        return own(cls, name, folder, rows, SENSOR=Sensor(*(size or (128, 128))), WINDOW=length)

    def features(self) -> dict[str, Feature | dict[str, Feature]]:
        return super().features() | dict.fromkeys(self.EXTRA, (str, ()))

    def read(self, row: Row, path: Path) -> Iterator[Sample]:
        where = f"{row.where}, {path}"
        if path.suffix == ".npz":
            events = formats.read_npz(path, where, ("t", "x"), ("y", "p"))
        else:
            events = formats.read_aedat(path.read_bytes(), where)
        events = check(events, self.SENSOR, where)
        t = events["t"].astype(np.int64)
        events["t"] = t
        start, stop = row.part or ((int(t[0]), int(t[-1]) + 1) if len(t) else (0, 0))
        if row.part and not (len(t) and start <= t[-1] and t[0] < stop):
            there = f"which are from {t[0]} to {t[-1]} microseconds" if len(t) else "of which there are none"
            raise BadSample(where, f"start and stop, {start} and {stop}, leave no event of the recording, {there}")
        if self.WINDOW is None:
            yield where, {"events": keep(events, (t >= start) & (t < stop)), "start": start}
            return
        if stop - start < self.WINDOW:
            raise BadSample(where, f"its {stop - start} microseconds are less than a window of {self.WINDOW}")
        for at, cut in windows(events, start, stop, self.WINDOW):
            yield f"{where}, {at} to {at + self.WINDOW} microseconds", {"events": cut, "start": at}


class Dvs128Objects(EventSet):
    """Five objects that move before a DVS128, 10 recordings cut into windows of 100 ms: 2,040 train, 944 test. 128 x 128.

    The recordings of the second series are for training, those of the first, made at another time, for testing. Objects that
    only one series has are left out, and so are further recordings of the repository. Reads a clone of the repository, or its recordings in one file events.npz: t, x, y and p
    of all recordings, joined; offsets, where each begins; its label, a number of classes, and its series. No licence is stated.
    https://github.com/eberlawrence/DVS128_BioLab.
    """

    name = "dvs128_objects"
    SENSOR = Sensor(128, 128)
    LABELS = ("box", "mug", "box cutter", "mechanical pencil", "scissors")
    WINDOW = 100_000
    JOBS_PER_SHARD = 1
    ARCHIVES = (Archive("events.npz", "", "https://github.com/eberlawrence/DVS128_BioLab", "DataSet2", direct=False),)
    FILES = ("Caixa", "Caneca", "Estilete", "Lapiseira", "Tesoura")
    SERIES = {"test": "DataSet2", "train": "NeuromorphicObjectDataSet_100/aedatFiles"}

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        path, jobs = paths[self.ARCHIVES[0].file], {"train": [], "test": []}
        if not path.is_dir():
            for split, label, where, events in self._file(path):
                jobs[split].append(partial(self._cut, label, where, events))
            return jobs
        for split, folder in self.SERIES.items():
            names = [*enumerate(self.FILES)] + [(2, "Estilete_1")] * (split == "train")
            for label, name in names:
                if not (file := path.parent / folder / f"{name}.aedat").is_file():
                    raise BadSample(str(path.parent), f"there is no file {folder}/{name}.aedat")
                jobs[split].append(partial(self._read, label, file))
        return jobs

    def _file(self, path: Path) -> Iterator[tuple[str, int, str, Events]]:
        found = formats.read_npz(path, str(path), ("t", "x", "y", "p", "offsets", "label", "series", "classes"))
        offsets, classes = found["offsets"], found["classes"].tolist()
        if offsets[-1] != len(found["t"]) or not len(offsets) - 1 == len(found["label"]) == len(found["series"]):
            raise BadSample(str(path), f"its offsets, label and series disagree with its {len(found['t'])} events")
        for i, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
            if (label := classes[found["label"][i]]) in self.LABELS:
                events = {column: found[column][start:stop] for column in "txyp"}
                yield list(self.SERIES)[found["series"][i]], self.LABELS.index(label), f"{path}, recording {i}", events

    def _read(self, label: int, path: Path) -> Iterator[Sample]:
        yield from self._cut(label, str(path), formats.read_aedat(path.read_bytes(), str(path)))

    def _cut(self, label: int, where: str, events: Events) -> Iterator[Sample]:
        t = events["t"].astype(np.int64)
        for at, cut in windows(events | {"t": t}, int(t[0]), int(t[-1]) + 1, self.WINDOW):
            yield f"{where}, {at} to {at + self.WINDOW} microseconds", {"events": cut, "start": at, "label": label}
