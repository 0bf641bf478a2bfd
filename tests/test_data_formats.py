"""The published formats, written here byte by byte, and read back: by us, and by tonic where its readers are right."""

import gc
import hashlib
import io
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from snnfuse.data import catalog, formats
from snnfuse.data import events as ev

pytest.importorskip("tensorflow_datasets", reason="the builders need the extra `data`")
h5py = pytest.importorskip("h5py", reason="the builders need the extra `data`")
tonic = pytest.importorskip("tonic", reason="the builders need the extra `data`")


NMNIST = ev.Sensor(34, 34)
DVS = ev.Sensor(128, 128)


def recording(n: int, seed: int, sensor: ev.Sensor, span: int = 300_000, start: int = 0) -> ev.Events:
    rng = np.random.default_rng(seed)
    return {
        "t": start + np.sort(rng.integers(0, span, n)),
        "x": rng.integers(0, sensor.width, n),
        "y": rng.integers(0, sensor.height, n),
        "p": rng.integers(0, 2, n),
    }


def write_nmnist(events: ev.Events) -> bytes:
    t = events["t"]
    rows = np.stack([events["x"], events["y"], events["p"] << 7 | t >> 16, t >> 8 & 255, t & 255], 1)
    return rows.astype(np.uint8).tobytes()


def write_aedat2(events: ev.Events) -> bytes:
    address = 127 - events["x"] << 8 | 127 - events["y"] << 1 | 1 - events["p"]
    body = np.stack([address, events["t"]], 1).astype(">u4").tobytes()
    return b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n# Timestamps tick is 1 us\r\n" + body


AEDAT3 = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"


def packet(words: np.ndarray, kind: int = 1, capacity: int | None = None, overflow: int = 0) -> bytes:
    capacity = len(words) if capacity is None else capacity
    head = np.array([(kind, 1)], "<i2,<i2").tobytes()
    head += np.array([8, 4, overflow, capacity, len(words), len(words)], "<i4").tobytes()
    return head + words.astype("<u4").tobytes() + bytes(8 * max(0, capacity - len(words)))


def words_of(events: ev.Events) -> np.ndarray:
    return np.stack([events["x"] << 17 | events["y"] << 2 | events["p"] << 1 | 1, events["t"] & 0x7FFFFFFF], 1)


def write_aedat3(events: ev.Events) -> bytes:
    return AEDAT3 + b"".join(packet(words_of(events)[i : i + 100]) for i in range(0, len(events["t"]), 100))


def write_hsd(path: Path, rows, labels, keys, speakers) -> None:
    with h5py.File(path, "w") as file:
        for name, dtype, column in (("times", np.float16, 0), ("units", np.uint16, 1)):
            data = file.create_dataset(f"spikes/{name}", (len(rows),), h5py.vlen_dtype(dtype))
            for i, row in enumerate(rows):
                data[i] = row[column].astype(dtype)
        file["labels"] = np.array(labels, np.uint16)
        file["extra/keys"] = np.array(keys, "S")
        file["extra/speaker"] = np.array(speakers, np.uint16)


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def trust(monkeypatch, name: str, manual: Path) -> None:
    """Our small archives have other digests than the published ones."""
    cls = catalog.data_set(name)
    now = []
    for archive in cls.ARCHIVES:
        path = manual / name / archive.file
        digest = "md5:" + hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else archive.digest
        now.append(archive._replace(digest=digest))
    monkeypatch.setattr(cls, "ARCHIVES", tuple(now))


def test_nmnist_time_overflow():
    events = recording(30, 0, NMNIST, span=8192)
    marker = {"t": np.array([0]), "x": np.array([0]), "y": np.array([240]), "p": np.array([0])}
    data = write_nmnist(events) + write_nmnist(marker) + write_nmnist(events)
    read = formats.read_nmnist(data, "overflow")
    assert np.array_equal(read["t"], np.concatenate([events["t"], events["t"] + 8192]))
    ev.check(read, NMNIST, "overflow")


def tonic_reads(path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # tonic leaves files open
        version, start, *_ = tonic.io.read_aedat_header_from_file(path)
        theirs = tonic.io.get_aer_events_from_file(path, version, start)
        gc.collect()
    return version, theirs


def test_aedat2_addresses_are_those_tonic_reads(tmp_path):
    events = recording(500, 3, DVS)
    path = tmp_path / "a.aedat"
    path.write_bytes(write_aedat2(events))
    version, theirs = tonic_reads(path)
    address = theirs["address"].astype(np.int64)
    ours = formats.read_aedat2(path.read_bytes(), "a")
    assert version == 2.0 and np.array_equal(ours["t"], theirs["timeStamp"])
    for column, bits in (
        ("x", 127 - (address >> 8 & 127)),
        ("y", 127 - (address >> 1 & 127)),
        ("p", 1 - (address & 1)),
    ):
        assert np.array_equal(ours[column], bits) and np.array_equal(ours[column], events[column])


def test_aedat3_events_are_those_tonic_reads(tmp_path):
    events = recording(450, 4, DVS)
    path = tmp_path / "a.aedat"
    path.write_bytes(write_aedat3(events))
    version, theirs = tonic_reads(path)
    ours = formats.read_aedat3(path.read_bytes(), "a")
    address = theirs["address"].astype(np.int64)
    assert version == 3.1 and np.array_equal(ours["t"], theirs["timeStamp"])
    for column, bits in (("x", address >> 17 & 0x1FFF), ("y", address >> 2 & 0x1FFF), ("p", address >> 1 & 1)):
        assert np.array_equal(ours[column], bits) and np.array_equal(ours[column], events[column])


def test_aedat2_leaves_out_what_is_no_pixels():
    events = recording(20, 3, DVS)
    marked = b"\0\0\xff\xff" + (123).to_bytes(4, "big")
    read = formats.read_aedat2(write_aedat2(events) + marked, "a")
    assert all(np.array_equal(read[column], events[column]) for column in "txyp")


def test_aedat3_takes_valid_polarity_events_only():
    events = recording(20, 5, DVS)
    words = words_of(events)
    words[3, 0] &= ~1  # marked invalid
    data = AEDAT3 + packet(words[:10], capacity=16) + packet(words_of(recording(5, 6, DVS)), kind=0)
    data += packet(words[10:], overflow=1)
    read = formats.read_aedat3(data, "a")
    kept = np.delete(np.arange(20), 3)
    wanted = events["t"] + np.where(np.arange(20) >= 10, 2**31, 0)
    assert np.array_equal(read["t"], wanted[kept]) and np.array_equal(read["x"], events["x"][kept])


def test_labels_may_come_from_a_spreadsheet():
    text = "\ufeffclass, startTime_usec,endTime_usec,\r\n5.0,1000, 100000,,\r\n,,\r\n"
    trials = formats.read_trials(text, "l")
    assert trials == [formats.Trial(4, 1000, 100000)]


def hsd_rows(n: int, seed: int):
    rng = np.random.default_rng(seed)
    return [(np.sort(rng.random(50 + i)), rng.integers(0, 700, 50 + i)) for i in range(n)]


def left_behind(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() or "incomplete" in p.name or p.name == "nmnist"]


TRIALS = "class,startTime_usec,endTime_usec\n2,1000,100000\n11,100000,200000\n"


EVENTS = recording(20, 0, DVS)
BAD_FILES = {
    "aedat2 magic": (formats.read_aedat2, b"#!AER-DAT1.0\r\n", "wrong magic"),
    "aedat2 truncated": (formats.read_aedat2, write_aedat2(EVENTS)[:-3], "truncated: 157 bytes"),
    "aedat2 other events": (
        formats.read_aedat2,
        write_aedat2(EVENTS)[:-8] + b"\x80" + bytes(7),
        "event 19 has address",
    ),
    "aedat3 magic": (formats.read_aedat3, write_aedat2(EVENTS), "wrong magic"),
    "aedat3 header": (formats.read_aedat3, b"#!AER-DAT3.1\r\n", "no end of the header"),
    "aedat3 truncated": (formats.read_aedat3, write_aedat3(EVENTS)[:-1], "truncated: a packet of 160 bytes"),
    "aedat3 truncated header": (formats.read_aedat3, write_aedat3(EVENTS) + bytes(5), "5 bytes of a packet header"),
    "aedat3 counts": (formats.read_aedat3, AEDAT3 + packet(words_of(EVENTS), capacity=3), "claims 20 of 3"),
    "aedat3 format": (
        formats.read_aedat3,
        AEDAT3.replace(b"#!END", b"#Format: SerializedTS,PNGFrames\r\n#!END") + packet(words_of(EVENTS)),
        "format SerializedTS,PNGFrames: only RAW packets are read",
    ),
    "aedat3 sources": (
        formats.read_aedat3,
        write_aedat3(EVENTS) + packet(words_of(EVENTS))[:2] + b"\2\0" + packet(words_of(EVENTS))[4:],
        "events of 2 sources",
    ),
    "labels fraction": (formats.read_trials, TRIALS + "1.5,2,3\n", "line 4"),
    "labels infinite": (formats.read_trials, TRIALS + "1,2,inf\n", "line 4"),
    "labels header": (formats.read_trials, "class,start\n", "wrong header"),
    "labels empty": (formats.read_trials, TRIALS.splitlines()[0], "no trials"),
    "labels text": (formats.read_trials, TRIALS + "one,2,3\n", "line 4"),
    "labels class": (formats.read_trials, TRIALS + "12,2,3\n", "a class is 1..11"),
    "labels order": (formats.read_trials, TRIALS + "1,3,3\n", "line 4"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files_are_named(fault):
    read, data, why = BAD_FILES[fault]
    with pytest.raises(ev.BadSample, match=f"^file 9: .*{why}"):
        read(data, "file 9")


def test_hsd_faults(tmp_path):
    rows, keys = hsd_rows(3, 0), [f"word {i}" for i in range(20)]
    path = tmp_path / "a.h5"
    rows[1][0][4] = np.nan
    write_hsd(path, rows, [0, 1, 25], keys, [0, 0, 0])
    hsd = formats.Hsd(path, "a.h5")
    with pytest.raises(ev.BadSample, match=r"a.h5\[1\]: event 4 has no finite time"):
        hsd.read(1)
    with pytest.raises(ev.BadSample, match=r"a.h5\[2\]: label 25 is none of 20"):
        hsd.read(2)
    hsd.file.close()
    write_hsd(path, rows, [0, 1], keys, [0, 0, 0])
    with pytest.raises(ev.BadSample, match="labels that disagree"):
        formats.Hsd(path, "a.h5")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ev.BadSample, match="truncated"):
        formats.Hsd(path, "a.h5")
