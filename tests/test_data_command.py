"""The command, the picture, the synthetic camera, and what happens without the extra."""

import json
import subprocess
import sys

import numpy as np
import pytest

from snnfuse.data import camera, catalog, optional, show
from snnfuse.data import events as ev

pytest.importorskip("tensorflow_datasets", reason="the command needs the extra `data`")
Image = pytest.importorskip("PIL.Image", reason="the command needs the extra `data`")
from snnfuse.data.__main__ import main  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A synthetic set of 2 + 2 digits, which stands for any set of events."""
    from snnfuse.data.builders.synthetic import SyntheticSaccades

    folder, jobs = tmp_path_factory.mktemp("tfds"), SyntheticSaccades.jobs
    with pytest.MonkeyPatch.context() as patch:
        few = lambda self, *args: {split: each[::2999] for split, each in jobs(self, *args).items()}
        patch.setattr(SyntheticSaccades, "jobs", few)
        assert main(["prepare", "synthetic_saccades", "--folder", str(folder)]) == 0
    return folder


def test_list_says_what_is_prepared_and_how_to_get_the_rest(folder, capsys):
    assert main(["list", "--folder", str(folder)]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in catalog.CATALOG)
    assert f"prepared in {folder}/synthetic_saccades" in text and "ibm.ent.box.com" in text


def test_a_set_that_needs_no_download_does_not_say_downloading(tmp_path, capfd):
    assert main(["info", "digits", "--folder", str(tmp_path)]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["name"].startswith("digits")
    assert (
        f"preparing digits in {tmp_path}" in said.err
        and "ownload" not in said.out.replace("no download", "") + said.err
    )


def test_info_counts_what_is_stored(folder, capsys):
    assert main(["info", "synthetic_saccades", "--folder", str(folder)]) == 0
    about = json.loads(capsys.readouterr().out)
    source = catalog.source("synthetic_saccades", "train", folder)
    assert about["about"].startswith("SYNTHETIC") and about["sensor"] == {"height": 34, "width": 34, "polarities": 2}
    train = about["splits"]["train"]
    assert train["samples"] == len(source) == 2
    assert train["events"] == sum(len(sample["events"]["t"]) for sample in source)
    rate = train["events"] / sum(int(sample["events"]["t"][-1]) for sample in source) * 1e6 / (34 * 34 * 2)
    assert train["hertz_per_place"] == pytest.approx(rate)


def test_show_draws_every_place_that_had_events(folder, tmp_path, capsys):
    out = tmp_path / "a.png"
    assert main(["show", "synthetic_saccades", "--folder", str(folder), "--out", str(out), "-T", "6"]) == 0
    sample = catalog.source("synthetic_saccades", "train", folder)[0]
    assert f"{len(sample['events']['t'])} events" in capsys.readouterr().out
    with Image.open(out) as image:
        picture = np.asarray(image)
    scale = 128 // 34
    assert picture.shape == (34 * scale, 6 * 34 * scale + 5 * 2, 3)
    counts = ev.to_frames(sample["events"], ev.Sensor(34, 34), 6, split="time")
    first = picture[::scale, : 34 * scale : scale]
    assert np.array_equal((first != 255).any(-1), counts[0].any(-1))
    gif = tmp_path / "a.gif"
    assert main(["show", "synthetic_saccades", "--folder", str(folder), "--out", str(gif), "-T", "6"]) == 0
    with Image.open(gif) as image:
        assert image.n_frames == 6


def test_a_row_of_channels_is_shown_over_time():
    sensor = ev.Sensor(1, 700, 1)
    events = {"t": np.array([0, 50, 99]), "x": np.array([0, 350, 699])}
    (picture,) = show.strip(show._raster(events, sensor, 10), 1)
    assert picture.shape == (700, 10, 3)
    assert np.argwhere((picture != 255).any(-1)).tolist() == [[0, 9], [349, 5], [699, 0]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["show", "synthetic_saccades", "--index", "9"], "has samples 0..1; got 9"),
        (["show", "synthetic_saccades", "--split", "valid"], "has splits"),
        (["info", "shd"], "python -m snnfuse.data prepare shd --download"),
        (
            ["prepare", "mnist5k", "--on-unsorted", "sort"],
            "on_unsorted is for events whose times go back; mnist5k holds",
        ),
        (
            ["prepare", "digits", "--manual", "there"],
            "manual is the folder of archives, or of your own data; digits needs",
        ),
        (
            ["show", "digits", "-T", "5"],
            "T is the number of frames of events that a camera saw, and this set has no such events; got 5",
        ),
        (["prepare", "dvs128_gesture"], "get it from https://ibm.ent.box.com"),
    ],
)
def test_errors_are_a_line(folder, capsys, arguments, message):
    assert main([*arguments, "--folder", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error


def digit() -> np.ndarray:
    image = np.zeros((28, 28))
    image[8:20, 12:16] = 1.0
    return image


def test_camera_events_follow_the_light():
    eye = camera.Camera()
    events = eye.record(digit())
    ev.check(events, eye.sensor, "camera")
    assert set(events["p"]) == {0, 1} and len(events["t"]) > 500
    again = eye.record(digit())
    assert all(np.array_equal(events[c], again[c]) for c in "txyp")
    # The picture returns to its first place. So each pixel has as many ON as OFF events, up to one threshold.
    balance = np.zeros((34, 34), int)
    np.add.at(balance, (events["y"], events["x"]), 2 * events["p"] - 1)
    assert np.abs(balance).max() <= 1
    # The first saccade moves the picture right and down, so light arrives at the right edge of the bar: ON there.
    first = (events["t"] < 20_000) & (events["y"] >= 10) & (events["y"] < 18)
    assert events["p"][first & (events["x"] == 16)].all() and (first & (events["x"] == 16)).any()
    assert not events["p"][first & (events["x"] == 12)].any() and (first & (events["x"] == 12)).any()


def test_camera_moves_as_n_mnist_stabilises():
    from tonic.datasets.nmnist import stabilize

    t = np.arange(1000, 315_000, 7000)
    x, y = np.rint(10 + camera.position(t)).astype(int).T
    events = np.rec.fromarrays([x, y, t, np.ones_like(t)], names="x,y,t,p").view(np.ndarray)
    still = stabilize(events.copy())
    assert len(still) == len(t) and np.ptp(still["x"]) <= 1 and np.ptp(still["y"]) <= 1  # rounded twice
    assert np.ptp(x) >= 6 and np.ptp(y) >= 6


def test_a_black_picture_is_a_sample_without_events():
    events = camera.Camera().record(np.zeros((28, 28)))
    assert len(ev.check(events, camera.Camera().sensor, "black")["t"]) == 0
    with pytest.raises(ValueError, match="image must be"):
        camera.Camera().record(np.full((28, 28), 255.0))


def test_importing_the_package_needs_no_extra():
    heavy = ("tensorflow_datasets", "grain", "array_record", "tonic", "h5py", "PIL")
    modules = "encoders, events, packed, augment, loader, catalog, camera, formats, archives, show"
    code = f"import sys; from snnfuse.data import {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r'pip install "snnfuse\[data\]"'):
        optional.require("grain")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"tensorflow_datasets.*snnfuse\[data\]"):
        catalog.source("digits", "train")
