"""Signals of several channels, such as muscle activity: a published set, and any folder of arrays with a table of labels."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snnfuse.data import formats
from snnfuse.data.archives import Archive
from snnfuse.data.builders.base import DataSet, Feature, Job, Sample, first_sound
from snnfuse.data.builders.table import TABLE, Row, TableSet, own, read_table
from snnfuse.data.events import BadSample


class SignalSet(DataSet):
    """Signals: `signal` [n, CHANNELS] in DTYPE, `label`, and the features in `EXTRA`."""

    CHANNELS: int
    DTYPE: type = np.float32
    EXTRA: tuple[str, ...] = ()

    def features(self) -> dict[str, Feature]:
        return {"signal": (self.DTYPE, (None, self.CHANNELS))} | dict.fromkeys(self.EXTRA, (str, ()))

    def metadata(self) -> dict:
        return {"channels": self.CHANNELS}


class SignalFolder(SignalSet, TableSet):
    """Your own signals: .npy files [n, channels], or .npz files with an array `signal`, and a table split.csv of their labels."""

    @classmethod
    def of(cls, name: str, folder: Path) -> type["SignalFolder"]:
        """The data set of a folder: labels and further columns are those of its table, the channels those of its first file."""
        rows = read_table(folder / TABLE)
        read = lambda row: formats.read_signal(row.path(folder), f"{row.where}, {row.path(folder)}")
        return own(cls, name, folder, rows, CHANNELS=first_sound(partial(read, row) for row in rows).shape[1])

    def read(self, row: Row, path: Path) -> Iterator[Sample]:
        where = f"{row.where}, {path}"
        signal = formats.read_signal(path, where)
        if signal.shape[1] != self.CHANNELS:
            raise BadSample(where, f"{signal.shape[1]} channels; the first file has {self.CHANNELS}")
        yield row.where, {"signal": row.cut(signal)}


class _Session(NamedTuple):
    where: str
    subject: int
    session: int
    emg: np.ndarray  # [n, 8]
    label: np.ndarray  # [n], 0 for rest


class EmgRoshambo(SignalSet):
    """Roshambo: rock, paper, scissors by 8 channels of muscle activity of 10 people, 450 gestures of about 400 samples.

    Sessions 1 and 2 of each person are for training, session 3 is for testing: the same people are on both sides. `subject`
    and `session` are texts. Reads the folder `data` of a clone of the repository, or those recordings in one file emg.npz:
    emg [n, 8] and label [n] of all recordings, joined; offsets, where each begins, and its subject and session. The rate is
    not stated. No licence is stated. https://github.com/freek1/roshambo.
    """

    name = "emg_roshambo"
    CHANNELS = 8
    DTYPE = np.int8
    EXTRA = ("subject", "session")
    LABELS = ("rock", "paper", "scissor")
    TEST = 3  # the session
    ARCHIVES = (Archive("emg.npz", "", "https://github.com/freek1/roshambo", "data", direct=False),)

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        path, jobs = paths[self.ARCHIVES[0].file], {"train": [], "test": []}
        for found in self._folder(path) if path.is_dir() else self._file(path):
            self._check(found)
            edges = np.flatnonzero(np.diff(found.label, prepend=0, append=0))
            for start, stop in zip(edges, edges[1:], strict=False):
                if found.label[start]:
                    split = "test" if found.session == self.TEST else "train"
                    jobs[split].append(partial(self._job, found, int(start), int(stop)))
        return jobs

    def _folder(self, path: Path) -> Iterator[_Session]:
        names = ["none", *self.LABELS]
        for file in sorted(path.glob("subject*_session*_emg.npy")):
            labels = file.with_name(file.name.replace("_emg", "_ann"))
            if not labels.is_file():
                raise BadSample(str(file), f"there is no file {labels}")
            try:
                emg, texts = np.load(file), np.load(labels).astype(str)
            except (OSError, EOFError, ValueError) as error:
                raise BadSample(
                    str(file), f"it or {labels.name} is no .npy file, or a truncated one: {error}"
                ) from error
            if len(unknown := np.setdiff1d(texts, names)):
                raise BadSample(str(labels), f"label {unknown[0]!r} is none of {', '.join(names)}")
            numbers = np.array([names.index(text) for text in texts.ravel()])
            _, subject, session = file.name.replace("session", "subject").split("subject")
            yield _Session(str(file), int(subject.strip("_")), int(session.split("_")[0]), emg, numbers)

    def _file(self, path: Path) -> Iterator[_Session]:
        found = formats.read_npz(path, str(path), ("emg", "label", "offsets", "subject", "session"))
        emg, label, offsets, subject, session = found.values()
        if offsets.ndim != 1 or len(offsets) != len(subject) + 1 or len(session) != len(subject):
            raise BadSample(
                str(path), f"{len(offsets)} offsets, for {len(subject)} subjects and {len(session)} sessions"
            )
        if offsets[0] != 0 or np.any(np.diff(offsets) < 1) or not offsets[-1] == len(emg) == len(label):
            raise BadSample(
                str(path), f"offsets must rise from 0 to the {len(emg)} rows of emg and the {len(label)} of label"
            )
        for i, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
            where = f"{path}, recording {i}"
            yield _Session(where, int(subject[i]), int(session[i]), emg[start:stop], label[start:stop].astype(np.int64))

    def _check(self, found: _Session) -> None:
        if found.emg.shape != (len(found.label), self.CHANNELS):
            raise BadSample(
                found.where, f"emg of shape {found.emg.shape}, not ({len(found.label)}, {self.CHANNELS}) as its labels"
            )
        if not np.array_equal(found.emg, found.emg.astype(np.int8)):
            raise BadSample(found.where, "emg must be whole numbers in -128..127")
        if not np.isin(found.label, range(len(self.LABELS) + 1)).all():
            raise BadSample(found.where, f"labels must be 0 (rest) to {len(self.LABELS)}; got {found.label.max()}")

    def _job(self, found: _Session, start: int, stop: int) -> Iterator[Sample]:
        signal = np.ascontiguousarray(found.emg[start:stop].astype(np.int8))
        texts = {"subject": str(found.subject), "session": str(found.session)}
        yield f"{found.where}, {start} to {stop}", {"signal": signal, "label": int(found.label[start]) - 1} | texts
