"""A table of recordings, split.csv: each row names a file, or a part of one, with its label and its split."""

import csv
import io
import re
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from snnfuse.data.archives import Archive
from snnfuse.data.builders.base import DataSet, Job, Sample
from snnfuse.data.events import BadSample

TABLE = "split.csv"
COLUMNS = ("file", "label", "split")
PART = ("start", "stop")


class Row(NamedTuple):
    """A recording: where its row stands, its file, its label, its split, the other columns, and the part that is meant.

    `part` is (start, stop) in the unit of the file: samples of sound, steps of a signal, microseconds of events. None is all.
    """

    where: str
    file: str
    label: str
    split: str
    extra: dict[str, str]
    part: tuple[int, int] | None = None

    def path(self, folder: Path) -> Path:
        """The file below `folder`. Raises BadSample if it is not there."""
        path = folder / self.file
        if not path.is_file():
            raise BadSample(self.where, f"there is no file {path}")
        return path

    def cut(self, samples: np.ndarray) -> np.ndarray:
        """The part of [n, ...] that the row means. Raises BadSample if the file is shorter."""
        start, stop = self.part or (0, len(samples))
        if stop > len(samples):
            raise BadSample(self.where, f"stop is {stop}, but {self.file} has {len(samples)} samples")
        return samples[start:stop]


def read_table(path: Path, extra: tuple[str, ...] | None = None) -> list[Row]:
    """The rows of a table with the columns file, label and split, and others; `extra` names the others that are wanted.

    The columns start and stop, if there are any, say which part of the file a row means.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(str(path), f"is no text in UTF-8: {error}") from None
    lines = csv.reader(io.StringIO(text), strict=True)
    header = [name.strip() for name in next(lines, [])]
    wanted = (*COLUMNS, *(extra or ()), *(PART if {*PART} & {*header} else ()))
    if missing := [name for name in wanted if name not in header]:
        raise BadSample(f"{path}, line 1", f"no column {', '.join(missing)}; the first line has {', '.join(header)}")
    taken = ("", "audio", "signal", "events")
    if bad := [name for name in header if header.count(name) > 1 or name in taken]:
        raise BadSample(
            f"{path}, line 1", f"a column must have a name of its own, and not {', '.join(taken[1:])}; got {bad[0]!r}"
        )
    others = [name for name in header if name not in (*COLUMNS, *PART)] if extra is None else extra
    rows, first = [], {}
    try:
        for fields in lines:
            if not any(fields):
                continue
            row = _row(f"{path}, line {lines.line_num}", dict(zip(header, fields, strict=False)), len(fields), header)
            if (before := first.setdefault((row.file, row.part), row.where)) != row.where:
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
    part = None
    if PART[0] in fields:
        start, stop = (fields[name] for name in PART)
        if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise BadSample(where, f"start and stop must be whole numbers, start below stop; got {start!r}, {stop!r}")
        part = int(start), int(stop)
    return Row(where, fields["file"], fields["label"], fields["split"], fields, part)


class TableSet(DataSet):
    """Recordings that a table lists; `read` makes the samples of a row. `EXTRA` are the other columns, kept as texts."""

    ARCHIVES = (Archive(TABLE, "", "", direct=False),)
    EXTRA: tuple[str, ...] = ()

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
        for name, features in self.read(row, row.path(folder)):
            yield name, features | {"label": self.label_names.index(row.label)} | row.extra

    def read(self, row: Row, path: Path) -> Iterator[Sample]:
        """The samples of a row, without label and texts."""
        raise NotImplementedError(f"{type(self).__name__} must define read(row, path)")


def own(kind: type[TableSet], name: str, folder: Path, rows: list[Row], **parts) -> type[TableSet]:
    """The data set of your own folder. Its labels are in the order of their numbers, or else of the alphabet."""
    labels = {row.label for row in rows}
    parts["LABELS"] = tuple(sorted(labels, key=int if all(map(str.isdecimal, labels)) else str))
    about = {"name": name, "EXTRA": tuple(rows[0].extra), "__module__": kind.__module__}
    return type(name, (kind,), about | {"__doc__": f"Your own recordings, from {folder.resolve()}."} | parts)
