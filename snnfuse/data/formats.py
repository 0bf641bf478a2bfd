"""Readers for the file formats of published data sets. They check every file; an error names the sample.

tonic reads N-MNIST, and h5py reads HDF5. AEDAT 2 and 3 are read here, because the readers of tonic 1.7 drop a truncated
tail, treat packets of any type as polarity events, and ignore the timestamp overflow. (Its `read_dvs_*` raise on every
file: they unpack two values where three are returned.)
"""

import csv
import io
import re
import wave
import zipfile
import zlib
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from snnfuse.data.events import BadSample, Events
from snnfuse.data.optional import require


def read_nmnist(data: bytes, name: str) -> Events:
    """N-MNIST .bin, 5 bytes an event: x, y, then polarity (1 bit) and microseconds (23 bits), the highest byte first.

    A y of 240 marks an overflow: 2^13 microseconds are added to all times that follow. Orchard et al. 2015,
    https://www.garrickorchard.com/datasets/n-mnist.
    """
    if len(data) % 5:
        raise BadSample(name, f"truncated: {len(data)} bytes are not a multiple of 5")
    if not data:
        return {column: np.empty(0, np.int64) for column in "txyp"}
    dtype = np.dtype([("x", np.int64), ("y", np.int64), ("t", np.int64), ("p", np.int64)])
    events = require("tonic.io").read_mnist_file(io.BytesIO(data), dtype, is_stream=True)
    return {column: events[column] for column in "txyp"}


_COMMENTS = re.compile(rb"(?:#[^\n]*\n)*")


def read_aedat2(data: bytes, name: str) -> Events:
    """AEDAT 2.0 of a DVS128, as CIFAR10-DVS publishes: comments, then address and microseconds, big-endian uint32.

    Bit 0 of an address is 1 for OFF. Bits 1-7 and 8-14 are the two axes, both flipped. Bit 15 marks an event that comes
    from no pixel (a timer, a wire); it is left out. x and y are chosen so that the pictures of CIFAR10-DVS stand upright,
    as in SpikingJelly. https://docs.inivation.com/software/software-advanced-usage/
    file-formats/aedat-2.0.html.
    """
    if not data.startswith(b"#!AER-DAT2.0"):
        raise BadSample(name, f"wrong magic: starts with {data[:12]!r}, not b'#!AER-DAT2.0'")
    body = data[_COMMENTS.match(data).end() :]
    if len(body) % 8:
        raise BadSample(name, f"truncated: {len(body)} bytes of events are no multiple of 8")
    address, t = np.frombuffer(body, ">u4").astype(np.int64).reshape(-1, 2).T
    if len(other := np.flatnonzero(address >> 16)):
        raise BadSample(name, f"event {other[0]} has address {address[other[0]]:#x}, which no DVS128 has")
    address, t = address[address >> 15 == 0], t[address >> 15 == 0]
    return {"t": t, "x": 127 - (address >> 8 & 0x7F), "y": 127 - (address >> 1 & 0x7F), "p": 1 - (address & 1)}


def read_aedat(data: bytes, name: str) -> Events:
    """AEDAT 2.0 of a DVS128 or AEDAT 3.1, by its first line; x to the right and y down, as jAER shows a DVS128."""
    if not data.startswith(b"#!AER-DAT2.0"):
        return read_aedat3(data, name)
    events = read_aedat2(data, name)
    return events | {"x": events["y"], "y": events["x"]}  # CIFAR10-DVS, for which `read_aedat2` is, has them exchanged


def read_npz(path, name: str, wanted: tuple[str, ...], others: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The arrays `wanted` of a NumPy .npz file, and those of `others` that it has."""
    try:
        with open(path, "rb") as raw, np.load(raw) as file:
            if missing := [key for key in wanted if key not in file]:
                raise BadSample(name, f"has no array {', '.join(missing)}; it has {', '.join(file) or 'none'}")
            return {key: file[key] for key in (*wanted, *others) if key in file}
    except (
        OSError,
        EOFError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:  # TypeError: a .npy file
        if isinstance(error, BadSample):
            raise
        raise BadSample(name, f"no .npz file that is read here, or a truncated one: {error}") from error


def read_signal(path, name: str) -> np.ndarray:
    """[n, channels] float32 from a .npy file, or from the array `signal` of a .npz file. All values must be finite."""
    if str(path).endswith(".npz"):
        values = read_npz(path, name, ("signal",))["signal"]
    else:
        try:
            values = np.load(path)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise BadSample(name, f"no .npy file that is read here, or a truncated one: {error}") from error
        if not isinstance(values, np.ndarray):
            values.close()
            raise BadSample(name, "no .npy file, but a .npz file with the wrong name")
    if values.ndim != 2 or not values.size or values.dtype.kind not in "iuf":
        raise BadSample(name, f"a signal must be numbers [n, channels]; got {values.dtype} of shape {values.shape}")
    with np.errstate(over="ignore"):  # a number beyond float32 becomes inf, and is named below
        narrow = values.astype(np.float32)
    if np.any(bad := ~np.isfinite(narrow)):
        step, channel = np.argwhere(bad)[0]
        raise BadSample(name, f"step {step} of channel {channel} is {values[step, channel]}, no finite float32")
    return narrow


_PACKET = np.dtype(
    [("type", "<i2"), ("source", "<i2")]
    + [(field, "<i4") for field in ("size", "ts_offset", "ts_overflow", "capacity", "number", "valid")]
)


def read_aedat3(data: bytes, name: str) -> Events:
    """AEDAT 3.1, as DVS128 Gesture publishes: a header, then packets of 28 bytes and `capacity` events.

    Polarity packets have type 1. In the data of an event bit 0 is 1 if it is valid, bit 1 is 1 for ON, bits 2-16 are y and
    bits 17-31 are x. The next 31 bits are the low bits of its time; ts_overflow holds the high bits. Invalid events and the
    unused end of a packet are left out. https://docs.inivation.com/software/software-advanced-usage/file-formats/aedat-3.1.html.
    """
    if not data.startswith(b"#!AER-DAT3."):
        raise BadSample(name, f"wrong magic: starts with {data[:11]!r}, not b'#!AER-DAT3.'")
    end = b"#!END-HEADER\r\n"
    if (start := data.find(end)) < 0:
        raise BadSample(name, "no end of the header")
    if formats := [f for f in re.findall(rb"(?m)^#Format: *([^\r\n]*)", data[:start]) if f.strip() != b"RAW"]:
        raise BadSample(name, f"format {formats[0].decode(errors='replace')}: only RAW packets are read")
    at, columns, sources = start + len(end), [], set()
    while at < len(data):
        if len(data) - at < _PACKET.itemsize:
            raise BadSample(name, f"truncated: {len(data) - at} bytes of a packet header at {at}")
        head = np.frombuffer(data, _PACKET, 1, at)[0]
        size, capacity, number = (int(head[field]) for field in ("size", "capacity", "number"))
        at += _PACKET.itemsize
        if size < 1 or not 0 <= number <= capacity:
            raise BadSample(name, f"packet before {at} claims {number} of {capacity} events of {size} bytes")
        if len(data) - at < size * capacity:
            raise BadSample(name, f"truncated: a packet of {size * capacity} bytes at {at}, {len(data) - at} left")
        if head["type"] == 1:
            if size != 8:
                raise BadSample(name, f"packet before {at} has polarity events of {size} bytes, not 8")
            if number:
                sources.add(int(head["source"]))
            words = np.frombuffer(data, "<u4", 2 * number, at).astype(np.int64).reshape(-1, 2)
            words[:, 1] |= int(head["ts_overflow"]) << 31
            columns.append(words[words[:, 0] & 1 == 1])
        at += size * capacity
    if len(sources) > 1:
        raise BadSample(name, f"polarity events of {len(sources)} sources, {sorted(sources)}: one camera is read")
    word, t = np.concatenate(columns).T if columns else np.empty((2, 0), np.int64)
    return {"t": t, "x": word >> 17 & 0x7FFF, "y": word >> 2 & 0x7FFF, "p": word >> 1 & 1}


def read_wav(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """(samples [n] int16, samples a second) of a .wav file of 16 bits and one channel."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            channels, width, rate, count = file.getparams()[:4]
            frames = file.readframes(count)
    except (wave.Error, EOFError) as error:
        raise BadSample(
            name, f"no .wav file that is read here, or a truncated one: {str(error) or 'it ends in its header'}"
        ) from None
    if channels != 1 or width != 2:
        raise BadSample(name, f"{channels} channels of {8 * width} bits; one channel of 16 bits is read")
    if len(frames) != 2 * count:
        raise BadSample(name, f"truncated: {len(frames)} bytes of sound, but its header says {2 * count}")
    if not count:
        raise BadSample(name, "no sound")
    return np.frombuffer(frames, "<i2").astype(np.int16), rate


class Trial(NamedTuple):
    """A line of a DVS128 Gesture labels file: the class, from 0, and the time [start, end) in microseconds."""

    label: int
    start: int
    end: int


def read_trials(text: str, name: str, classes: int = 11) -> list[Trial]:
    """DVS128 Gesture's *_labels.csv: class (from 1), startTime_usec, endTime_usec.

    A byte-order mark, commas at the end of a line and whole numbers such as 5.0 are what a spreadsheet leaves; they are read.
    """
    rows = [[field.strip() for field in row] for row in csv.reader(io.StringIO(text.removeprefix("\ufeff")))]
    header, *rows = [_without_empty_end(row) for row in rows] or [[]]
    if header != ["class", "startTime_usec", "endTime_usec"]:
        raise BadSample(name, f"wrong header {header}")
    trials = []
    for number, row in enumerate(filter(None, rows), start=2):
        try:
            label, start, end = map(_whole_number, row)
        except ValueError:
            raise BadSample(name, f"line {number} is {row}, not three whole numbers") from None
        if not 1 <= label <= classes or start >= end:
            raise BadSample(name, f"line {number} is {row}: a class is 1..{classes}, and starts before it ends")
        trials.append(Trial(label - 1, start, end))
    if not trials:
        raise BadSample(name, "no trials")
    return trials


def _without_empty_end(row):
    while row and not row[-1]:
        row = row[:-1]
    return row


def _whole_number(text):
    value = Decimal(text) if re.fullmatch(r"[+-]?\d+(\.0*)?", text) else Decimal("NaN")
    return int(value)  # ValueError if it is none


class Hsd:
    """An SHD or SSC .h5: spikes/times in seconds, spikes/units 0..699, labels, extra/keys the label names.

    Times are cut to whole microseconds, as in tonic. Cramer et al. 2020, https://arxiv.org/abs/1910.07407.
    """

    def __init__(self, path, name: str):
        h5py = require("h5py")
        try:
            self.file = h5py.File(path, "r")
        except OSError as error:
            raise BadSample(name, f"no HDF5 file, or a truncated one: {error}") from error
        self.name = name
        wanted = ("spikes/times", "spikes/units", "labels", "extra/keys")
        if missing := [key for key in wanted if key not in self.file]:
            self.file.close()
            raise BadSample(name, f"has no {', '.join(missing)}")
        lengths = {key: len(self.file[key]) for key in wanted[:3]}
        if len(set(lengths.values())) != 1:
            self.file.close()
            raise BadSample(name, f"labels that disagree: lengths {lengths}")
        self.keys = [key.decode() for key in self.file["extra/keys"][()]]
        self.speakers = self.file["extra/speaker"][()] if "extra/speaker" in self.file else None

    def __len__(self) -> int:
        return len(self.file["labels"])

    def read(self, index: int) -> tuple[Events, int, int]:
        """Events, label and speaker (-1 if none is given) of one row. Only this row is read."""
        name = f"{self.name}[{index}]"
        times = self.file["spikes/times"][index].astype(np.float64)
        if not np.all(np.isfinite(times)):
            raise BadSample(name, f"event {int((~np.isfinite(times)).argmax())} has no finite time")
        label = int(self.file["labels"][index])
        if not 0 <= label < len(self.keys):
            raise BadSample(name, f"label {label} is none of {len(self.keys)}")
        events = {"t": (times * 1e6).astype(np.int64), "x": self.file["spikes/units"][index].astype(np.int64)}
        return events, label, -1 if self.speakers is None else int(self.speakers[index])
