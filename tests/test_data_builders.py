"""A prepared data set equals the content of its archives. A fault is named, and leaves no files behind."""

import hashlib
import http.server
import json
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

tonic = pytest.importorskip("tonic", reason="the builders need the extra `data`")
from test_data_formats import (  # noqa: E402
    DVS,
    NMNIST,
    TRIALS,
    hsd_rows,
    left_behind,
    recording,
    trust,
    write_aedat2,
    write_aedat3,
    write_hsd,
    write_nmnist,
    write_tar,
    write_zip,
)

from snnfuse.data import archives, catalog  # noqa: E402
from snnfuse.data import events as ev  # noqa: E402


def same(stored: dict, events: ev.Events, start: int = 0) -> None:
    assert stored["start"] == start
    for column in stored["events"]:
        wanted = events[column] - (start if column == "t" else 0)
        assert np.array_equal(stored["events"][column], wanted), column


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


def test_cifar10dvs_is_the_files(tmp_path, monkeypatch):
    labels = catalog.data_set("cifar10dvs").LABELS
    written = {}
    for c, label in enumerate(labels):
        of_class = {i: recording(30, 10 * c + i, DVS, start=5_000_000) for i in (0, 2, 10)}  # sorted as numbers
        written[label] = of_class
        files = {f"{label}/cifar10_{label}_{i}.aedat": write_aedat2(events) for i, events in of_class.items()}
        write_zip(tmp_path / "cifar10dvs" / f"{label}.zip", files)
    trust(monkeypatch, "cifar10dvs", tmp_path)
    monkeypatch.setattr(catalog.data_set("cifar10dvs"), "TRAIN", 2)
    catalog.prepare("cifar10dvs", tmp_path, manual=tmp_path)
    train, test = (catalog.source("cifar10dvs", split, tmp_path) for split in ("train", "test"))
    assert (len(train), len(test)) == (20, 10)
    for c, label in enumerate(labels):
        for sample, i in ((train[2 * c], 0), (train[2 * c + 1], 2), (test[c], 10)):
            assert sample["label"] == c
            same(sample, written[label][i], start=int(written[label][i]["t"][0]))


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


def broken(n: int = 20, **change) -> bytes:
    return write_nmnist(recording(n, 0, NMNIST) | change)


BAD_NMNIST = {
    "truncated": (broken()[:-2], "truncated: 98 bytes"),
    "coordinate": (broken(x=np.full(20, 34)), "event 0 has x = 34, outside 0..33"),
    "time": (broken(t=np.r_[np.arange(19), 5]), "event 19 has t = 5, before 18"),
}


def test_an_empty_recording_is_a_sample(tmp_path, monkeypatch):
    write_nmnist_archives(tmp_path, {"Train/3/00021.bin": b""})
    trust(monkeypatch, "nmnist", tmp_path)
    catalog.prepare("nmnist", tmp_path / "data", manual=tmp_path)
    source = catalog.source("nmnist", "train", tmp_path / "data")
    (empty,) = [sample for sample in source if sample["index"] == 21]
    assert len(source) == 20 and {len(values) for values in empty["events"].values()} == {0}
    assert not ev.to_frames(empty["events"], NMNIST, 4).any()


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


def test_a_bad_sample_of_a_folder_is_named_with_the_folder(tmp_path):
    write_nmnist_archives(tmp_path, {"Train/3/00021.bin": b"abc"})
    for split in ("train", "test"):
        with zipfile.ZipFile(tmp_path / "nmnist" / f"{split}.zip") as zipped:
            zipped.extractall(tmp_path / "nmnist")
        (tmp_path / "nmnist" / f"{split}.zip").unlink()
    with pytest.raises(ev.BadSample, match=f"^{tmp_path}/nmnist/Train/3/00021.bin: truncated: 3 bytes"):
        catalog.prepare("nmnist", tmp_path / "data", manual=tmp_path)


def test_unsorted_times_can_be_sorted_and_counted(tmp_path, monkeypatch):
    events = recording(20, 0, NMNIST)
    shuffled = {column: values[::-1] for column, values in events.items()}
    write_nmnist_archives(tmp_path, {"Train/3/00021.bin": write_nmnist(shuffled)})
    trust(monkeypatch, "nmnist", tmp_path)
    made = catalog.prepare("nmnist", tmp_path / "data", manual=tmp_path, on_unsorted="sort")
    assert made.info.metadata["sorted"]["count"] == 1
    (stored,) = (s for s in catalog.source("nmnist", "train", tmp_path / "data") if s["index"] == 21)
    assert np.array_equal(stored["events"]["t"], events["t"]) and len(stored["events"]["x"]) == 20


@pytest.mark.parametrize("on_bad, on_unsorted", [("skip", None), ("raise", "skip"), ("skip", "raise"), ("raise", None)])
def test_unsorted_times_are_treated_as_bad_samples_unless_it_is_said(tmp_path, monkeypatch, on_bad, on_unsorted):
    shuffled = {column: values[::-1] for column, values in recording(20, 0, NMNIST).items()}
    write_nmnist_archives(tmp_path, {"Train/3/00021.bin": write_nmnist(shuffled)})
    trust(monkeypatch, "nmnist", tmp_path)
    make = lambda: catalog.prepare("nmnist", tmp_path / "data", manual=tmp_path, on_bad=on_bad, on_unsorted=on_unsorted)
    if (on_unsorted or on_bad) == "raise":
        with pytest.raises(ev.Unsorted, match="Train/3/00021.bin"):
            make()
    else:
        assert make().info.splits["train"].num_examples == 19


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


def test_archives_are_verified_and_missing_ones_explained(tmp_path):
    write_nmnist_archives(tmp_path)
    with pytest.raises(ValueError, match="train.zip: md5 .* but train.zip was published with 20959b8e"):
        catalog.prepare("nmnist", tmp_path / "data", manual=tmp_path)
    with pytest.raises(archives.Missing, match="python -m snnfuse.data prepare nmnist --download"):
        catalog.source("nmnist", "train", tmp_path / "data")
    with pytest.raises(archives.Missing, match="get it from https://ibm.ent.box.com"):
        catalog.prepare("dvs128_gesture", tmp_path / "data", manual=tmp_path)
    assert not left_behind(tmp_path / "data")


@pytest.fixture
def served(tmp_path):
    """The address of a small web server that serves `tmp_path / "served"`."""
    (folder := tmp_path / "served").mkdir()
    handler = partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_fetch_verifies_before_it_names(tmp_path, served):
    (tmp_path / "served" / "a").write_bytes(b"archive")
    url, md5 = f"{served}/a", hashlib.md5(b"archive").hexdigest()
    path = archives.fetch(archives.Archive("a.zip", f"md5:{md5}", url), tmp_path / "manual")
    assert path.read_bytes() == b"archive"
    with pytest.raises(ValueError, match=f"{url}: this is not the b.zip published with md5:0123"):
        archives.fetch(archives.Archive("b.zip", "md5:0123", url), tmp_path / "manual")
    with pytest.raises(archives.Missing, match="could not be fetched"):
        archives.fetch(archives.Archive("c.zip", "md5:0123", url + "-not"), tmp_path / "manual")
    assert [p.name for p in (tmp_path / "manual").iterdir()] == ["a.zip"]


def test_published_digests_are_those_of_tonic_and_tfds(tmp_path):
    import tensorflow_datasets as tfds

    cls = {name: catalog.data_set(name) for name in catalog.CATALOG}
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
