"""Recordings of sound: spoken digits, spoken commands, and any folder of .wav files with a table of labels."""

import csv
import io
import re
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snnfuse.data import formats
from snnfuse.data.archives import Archive
from snnfuse.data.builders.base import DataSet, Feature, Job, Sample
from snnfuse.data.events import BadSample

TABLE = "split.csv"
COLUMNS = ("file", "label", "split")


class Row(NamedTuple):
    """A recording: where its row stands, its file, its label, its split, and the other columns."""

    where: str
    file: str
    label: str
    split: str
    extra: dict[str, str]


class AudioSet(DataSet):
    """Recordings: `audio` [n] int16, RATE samples a second, `label`, and the texts in `EXTRA` (as bytes)."""

    RATE: int
    EXTRA: tuple[str, ...] = ()

    def features(self) -> dict[str, Feature]:
        return {"audio": (np.int16, (None,))} | dict.fromkeys(self.EXTRA, (str, ()))

    def metadata(self) -> dict:
        return {"rate": self.RATE}

    @classmethod
    def rows(cls, path: Path) -> list[Row]:
        """The recordings that the file or folder `path`, the first of ARCHIVES, lists."""
        return read_table(path, cls.EXTRA)

    def jobs(self, paths: dict[str, Path], stack: ExitStack) -> dict[str, list[Job]]:
        path = paths[self.ARCHIVES[0].file]
        folder, jobs = path.parent, {}
        for row in self.rows(path):
            jobs.setdefault(row.split, []).append(partial(self._job, folder, row))
        return jobs

    def _job(self, folder: Path, row: Row) -> Iterator[Sample]:
        if row.label not in self.label_names:
            raise BadSample(row.where, f"label {row.label!r} is none of {', '.join(self.label_names)}")
        path = folder / row.file
        if not path.is_file():
            raise BadSample(row.where, f"there is no file {path}")
        audio, rate = formats.read_wav(path.read_bytes(), f"{row.where}, {path}")
        if rate != self.RATE:
            raise BadSample(f"{row.where}, {path}", f"{rate} samples a second; the data set has {self.RATE}")
        yield row.where, {"audio": audio, "label": self.label_names.index(row.label)} | row.extra


def read_table(path: Path, extra: tuple[str, ...] | None = None) -> list[Row]:
    """The rows of a table with the columns file, label and split, and others; `extra` names the others that are wanted."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(str(path), f"is no text in UTF-8: {error}") from None
    lines = csv.reader(io.StringIO(text), strict=True)
    header = [name.strip() for name in next(lines, [])]
    if missing := [name for name in (*COLUMNS, *(extra or ())) if name not in header]:
        raise BadSample(f"{path}, line 1", f"no column {', '.join(missing)}; the first line has {', '.join(header)}")
    if bad := [name for name in header if header.count(name) > 1 or name in ("", "audio")]:
        raise BadSample(f"{path}, line 1", f"a column must have a name of its own, and not audio; got {bad[0]!r}")
    others = [name for name in header if name not in COLUMNS] if extra is None else extra
    rows, first = [], {}
    try:
        for fields in lines:
            if not any(fields):
                continue
            row = _row(f"{path}, line {lines.line_num}", dict(zip(header, fields, strict=False)), len(fields), header)
            if (before := first.setdefault(row.file, row.where)) != row.where:
                raise BadSample(row.where, f"{row.file} is there already, in {before.rpartition(', ')[2]}")
            rows.append(row._replace(extra={name: row.extra[name] for name in others}))
    except csv.Error as error:
        raise BadSample(f"{path}, line {lines.line_num}", str(error)) from None
    if not rows:
        raise BadSample(str(path), "no recordings")
    return rows


def _row(where, fields, count, header):
    if count != len(header):
        raise BadSample(where, f"{count} fields; the first line has {len(header)}: {', '.join(header)}")
    fields = {name: text.strip() for name, text in fields.items()}
    if empty := [name for name in COLUMNS if not fields[name]]:
        raise BadSample(where, f"{empty[0]} is empty")
    if not re.fullmatch(r"[A-Za-z]\w*", fields["split"]):
        raise BadSample(where, f"split must be a word, such as train or test; got {fields['split']!r}")
    if Path(fields["file"]).is_absolute() or ".." in Path(fields["file"]).parts:
        raise BadSample(where, f"file must lie below the folder of the table; got {fields['file']}")
    return Row(where, fields["file"], fields["label"], fields["split"], fields)


class WavFolder(AudioSet):
    """Your own recordings: a folder of .wav files (16 bits, one channel, one rate) and a table split.csv of their labels."""

    ARCHIVES = (Archive(TABLE, "", "", direct=False),)

    @classmethod
    def of(cls, name: str, folder: Path) -> type["WavFolder"]:
        """The data set of a folder: its labels, further columns and rate are those of its table and of its first file."""
        rows = read_table(folder / TABLE)
        labels = {row.label for row in rows}
        order = int if all(map(str.isdigit, labels)) else str
        first = folder / rows[0].file
        if not first.is_file():
            raise BadSample(rows[0].where, f"there is no file {first}")
        rate = formats.read_wav(first.read_bytes(), f"{rows[0].where}, {first}")[1]
        parts = {"name": name, "LABELS": tuple(sorted(labels, key=order)), "RATE": rate}
        parts |= {
            "EXTRA": tuple(rows[0].extra),
            "__doc__": f"Your own recordings, from {folder}.",
            "__module__": __name__,
        }
        return type(name, (cls,), parts)


class SpeechCommands(AudioSet):
    """Speech Commands v0.02, its test files: 10 words, unknown words and silence, 4,890 clips of 1 s at 16 kHz.

    Needs the class folders of the official test archive and a table split.csv with the columns file, label, group and split:
    `group` is the speaker. No split of the test files is published, so compare no accuracy with published ones. Warden 2018,
    https://arxiv.org/abs/1804.03209. CC BY 4.0.
    """

    name = "speech_commands"
    RATE = 16_000
    EXTRA = ("group",)
    LABELS = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes", "_silence_", "_unknown_")
    ARCHIVES = (
        Archive(TABLE, "", "http://download.tensorflow.org/data/speech_commands_test_set_v0.02.tar.gz", direct=False),
    )


class SpokenDigits(AudioSet):
    """Free Spoken Digit Dataset: 3,000 recordings of ten English digits by six speakers, 50 each, 8 kHz, 0.1 to 2.3 s.

    Reads the folder `recordings` of its repository, files named DIGIT_SPEAKER_INDEX.wav. The split is the authors': 0 to 4 of
    each digit and speaker are for testing, so every speaker is on both sides. `speaker` lets you hold one out. Jackson et al.,
    https://doi.org/10.5281/zenodo.1342401. CC BY-SA 4.0.
    """

    name = "spoken_digits"
    RATE = 8_000
    EXTRA = ("speaker",)
    LABELS = tuple("0123456789")
    TEST = 5
    ARCHIVES = (
        Archive(
            "recordings", "", "https://github.com/Jakobovski/free-spoken-digit-dataset", "recordings", direct=False
        ),
    )

    @classmethod
    def rows(cls, path: Path) -> list[Row]:
        rows = []
        for file in sorted(path.glob("*.wav")):
            found = re.fullmatch(r"(\d)_([A-Za-z]+)_(\d+)", file.stem)
            if not found:
                raise BadSample(str(file), "the name is not DIGIT_SPEAKER_INDEX.wav")
            digit, speaker, index = found.groups()
            split = "test" if int(index) < cls.TEST else "train"
            rows.append(Row(str(file), f"{path.name}/{file.name}", digit, split, {"speaker": speaker}))
        return rows
