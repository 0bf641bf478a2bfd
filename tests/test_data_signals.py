"""Your own signals and events with their table, and the published sets of both: what is read, and what is refused."""

import json

import numpy as np
import pytest
from test_data_audio import chirp, wav
from test_data_formats import DVS, left_behind, recording, write_aedat2, write_aedat3

from snnfuse.data import archives, catalog, formats
from snnfuse.data import events as ev
from snnfuse.data.__main__ import main

Image = pytest.importorskip("PIL.Image", reason="the command needs the extra `data`")


def table(folder, *rows, head="file,label,split"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "split.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder


def signal(n, channels=3):
    return np.random.default_rng(n).normal(0, 1, (n, channels)).astype(np.float32)


# ---- signals


def own_signals(folder, *more, head="file,label,split,start,stop,arm"):
    root = table(
        folder / "arms",
        "a.npy,rest,train,0,40,left",
        "a.npy,fist,train,40,100,left",
        "b.npz,fist,test,5,90,right",
        *more,
        head=head,
    )
    np.save(root / "a.npy", (100 * signal(100)).astype(np.int8))
    np.savez(root / "b.npz", signal=signal(90))
    return folder


def test_your_own_signals_are_parts_of_files(tmp_path):
    made = catalog.prepare("arms", tmp_path / "data", manual=own_signals(tmp_path))
    assert made.info.features["label"].names == ["fist", "rest"] and made.info.metadata["channels"] == 3
    train, test = (catalog.source("arms", split, tmp_path / "data") for split in ("train", "test"))
    whole = (100 * signal(100)).astype(np.int8)
    np.testing.assert_array_equal(train[0]["signal"], whole[:40])
    np.testing.assert_array_equal(train[1]["signal"], whole[40:])
    np.testing.assert_array_equal(test[0]["signal"], signal(90)[5:])
    assert [int(s["label"]) for s in (*train, *test)] == [1, 0, 0] and test[0]["arm"] == b"right"


SIGNAL_FAULTS = {
    "past the end": (["a.npy,fist,train,90,101,left"], r"line 5: stop is 101, but a.npy has 100 samples"),
    "stop before start": (["a.npy,fist,train,9,9,left"], r"line 5: start and stop must be .*; got '9', '9'"),
    "the same part twice": (["a.npy,fist,test,0,40,left"], r"line 5: a.npy is there already, in line 2"),
    "no file": (["z.npy,fist,train,0,1,left"], r"line 5: there is no file .*z.npy"),
    "other channels": (["wide.npy,fist,train,0,1,left"], r"line 5, .*wide.npy: 5 channels; the first file has 3"),
    "no number": (["nan.npy,fist,train,0,1,left"], r"line 5, .*nan.npy: step 3 of channel 1 is nan"),
    "beyond float32": (["huge.npy,fist,train,0,1,left"], r"line 5, .*huge.npy: step 0 of channel 0 is 1e\+300"),
    "an .npz as .npy": (["zip.npy,fist,train,0,1,left"], r"line 5, .*zip.npy: no .npy file, but a .npz"),
    "an .npy as .npz": (["array.npz,fist,train,0,1,left"], r"line 5, .*array.npz: no .npz file"),
    "one axis": (
        ["flat.npy,fist,train,0,1,left"],
        r"line 5, .*flat.npy: a signal must be numbers \[n, channels\]; got float64",
    ),
    "cut off": (["cut.npy,fist,train,0,1,left"], r"line 5, .*cut.npy: no .npy file .*truncated"),
    "a cut .npz": (["cut.npz,fist,train,0,1,left"], r"line 5, .*cut.npz: no .npz file .*truncated"),
    "another array": (["other.npz,fist,train,0,1,left"], r"line 5, .*other.npz: has no array signal; it has emg"),
}


@pytest.mark.parametrize("fault", SIGNAL_FAULTS)
def test_a_fault_of_a_signal_names_file_and_line(tmp_path, fault):
    rows, why = SIGNAL_FAULTS[fault]
    root = own_signals(tmp_path, *rows) / "arms"
    np.save(root / "wide.npy", signal(9, 5))
    nan = signal(9)
    nan[3, 1] = np.nan
    np.save(root / "nan.npy", nan)
    np.save(root / "flat.npy", np.zeros(9))
    np.save(root / "huge.npy", np.full((9, 3), 1e300))
    (root / "zip.npy").write_bytes((root / "b.npz").read_bytes())
    (root / "array.npz").write_bytes((root / "a.npy").read_bytes())
    np.savez(root / "other.npz", emg=signal(9))
    (root / "cut.npy").write_bytes((root / "a.npy").read_bytes()[:-5])
    (root / "cut.npz").write_bytes((root / "b.npz").read_bytes()[:-30])
    with pytest.raises(ev.BadSample, match=f"split.csv, {why}"):
        catalog.prepare("arms", tmp_path / "data", manual=tmp_path)
    assert not left_behind(tmp_path / "data")


def test_start_needs_stop(tmp_path):
    with pytest.raises(ev.BadSample, match="line 1: no column stop"):
        catalog.prepare("arms", tmp_path / "data", manual=own_signals(tmp_path, head="file,label,split,start,end,arm"))


def test_the_command_lists_counts_and_draws_signals(tmp_path, capsys):
    own_signals(tmp_path)
    common = ["--folder", str(tmp_path / "data")]
    assert main(["prepare", "arms", "--manual", str(tmp_path), *common]) == 0
    assert main(["list", *common]) == 0 and "arms                 prepared in" in capsys.readouterr().out
    assert main(["info", "arms", *common]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["channels"] == 3 and about["splits"]["train"]["steps_per_sample"] == 50
    assert main(["show", "arms", "--index", "1", "--out", str(tmp_path / "a.png"), *common]) == 0
    assert "arms/train[1]: fist, 60 steps of 3 channels" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as image:
        picture = np.asarray(image).astype(int)
    scale = 800 // 60
    assert picture.shape == (3 * 40, 60 * scale, 3)
    blue = (picture == np.array([32, 96, 200])).all(-1)[:40, ::scale]  # the first channel
    values = (100 * signal(100)).astype(np.int8)[40:]
    highest = int(values[:, 0].argmax())
    assert blue.any(0).all() and blue[:, highest].argmax() == blue.any(1).argmax()
    for option, value in (("--size", "8"), ("--rate", "8000"), ("--window", "10")):
        arguments = ["prepare", "again", "--manual", str(tmp_path), option, value, *common]
        (tmp_path / "again").exists() or (tmp_path / "arms").rename(tmp_path / "again")
        assert main(arguments) == 1
        assert f"error: {option[2:]} " in capsys.readouterr().err


def emg(n=30):
    label = np.zeros(n, np.uint8)
    label[5:12], label[20:28] = 2, 3
    return np.random.default_rng(0).integers(-90, 90, (n, 8)).astype(np.int8), label


def test_emg_roshambo_is_read_from_its_repository_and_from_one_file(tmp_path):
    values, label = emg()
    folder = tmp_path / "clone" / "emg_roshambo" / "data"
    folder.mkdir(parents=True)
    names = np.array(["none", "rock", "paper", "scissor"])[label]
    for session in (2, 3):
        np.save(folder / f"subject04_session{session:02d}_emg.npy", values + 0.0 * session)
        np.save(folder / f"subject04_session{session:02d}_ann.npy", names)
    one = tmp_path / "file" / "emg_roshambo"
    one.mkdir(parents=True)
    arrays = dict(
        emg=np.tile(values, (2, 1)), label=np.tile(label, 2), offsets=[0, 30, 60], subject=[4, 4], session=[2, 3]
    )
    np.savez(one / "emg.npz", **arrays)
    for form in ("clone", "file"):
        catalog.prepare("emg_roshambo", tmp_path / f"{form} data", manual=tmp_path / form)
        for split, session in (("train", b"2"), ("test", b"3")):
            source = catalog.source("emg_roshambo", split, tmp_path / f"{form} data")
            assert [(int(s["label"]), s["subject"], s["session"]) for s in source] == [
                (1, b"4", session),
                (2, b"4", session),
            ]
            np.testing.assert_array_equal(source[0]["signal"], values[5:12])
            np.testing.assert_array_equal(source[1]["signal"], values[20:28])
    for change, why in (
        (dict(offsets=[0, 30, 59]), "emg.npz: offsets must rise from 0 to the 60 rows"),
        (dict(label=np.full(60, 4, np.uint8)), "recording 0: labels must be 0 .rest. to 3; got 4"),
        (dict(emg=np.full((60, 8), 0.5)), "recording 0: emg must be whole numbers"),
        (dict(emg=np.zeros((60, 7))), "recording 0: emg of shape"),
    ):
        np.savez(one / "emg.npz", **(arrays | change))
        with pytest.raises(ev.BadSample, match=why):
            catalog.prepare("emg_roshambo", tmp_path / "again", manual=tmp_path / "file")
    assert not left_behind(tmp_path / "again")


# ---- sound at another rate


def test_sound_is_resampled_if_asked_for(tmp_path):
    root = table(tmp_path / "words", "a.wav,yes,train", "b.wav,no,test")
    tone = np.rint(8000 * np.sin(2 * np.pi * 0.02 * np.arange(4000)))  # 320 Hz at 16,000 samples a second
    (root / "a.wav").write_bytes(wav(tone, rate=16_000))
    (root / "b.wav").write_bytes(wav(chirp(600), rate=8000))
    made = catalog.prepare("words", tmp_path / "data", manual=tmp_path, rate=8000)
    assert made.info.metadata["rate"] == 8000
    half = catalog.source("words", "train", tmp_path / "data")[0]["audio"]
    assert len(half) == 2000 and np.abs(half[100:-100] - tone[::2][100:-100]).max() < 20
    np.testing.assert_array_equal(catalog.source("words", "test", tmp_path / "data")[0]["audio"], chirp(600))
    with pytest.raises(ValueError, match="words is prepared in .* with rate 8000: remove .*; got rate 9000"):
        catalog.prepare("words", tmp_path / "data", manual=tmp_path, rate=9000)
    root = table(
        tmp_path / "speech_commands", "a.wav,yes,train,ann", "b.wav,no,test,bob", head="file,label,split,group"
    )
    for name in ("a.wav", "b.wav"):
        (root / name).write_bytes(wav(tone, rate=16_000))
    catalog.prepare("speech_commands", tmp_path / "data", manual=tmp_path, rate=8000)
    assert len(catalog.source("speech_commands", "test", tmp_path / "data")[0]["audio"]) == 2000
    assert catalog.sound_rate(catalog.prepared_in("speech_commands", tmp_path / "data")) == 8000


# ---- events


def own_events(folder, *more):
    root = table(folder / "cups", "a.npz,cup,train", "b.aedat,mug,train", "c.aedat,cup,test", *more)
    a, b, c = (recording(300, seed, DVS, span=35_000, start=1000) for seed in range(3))
    np.savez(root / "a.npz", **a)
    (root / "b.aedat").write_bytes(write_aedat2(b))
    (root / "c.aedat").write_bytes(write_aedat3(c))
    return a, b | {"x": b["y"], "y": b["x"]}, c


def test_your_own_events_are_cut_into_windows(tmp_path):
    a, b, c = own_events(tmp_path)
    made = catalog.prepare("cups", tmp_path / "data", manual=tmp_path, size=(128, 128), window=10)
    assert made.info.metadata["window"] == 10_000
    train, test = (list(catalog.source("cups", split, tmp_path / "data")) for split in ("train", "test"))
    assert (len(train), len(test)) == (6, 3)  # 3 windows of 10 ms in each of 35
    assert [int(s["label"]) for s in train] == [0] * 3 + [1] * 3
    for samples, events in ((train[:3], a), (train[3:], b), (test, c)):
        for i, sample in enumerate(samples):
            start = events["t"][0] + 10_000 * i
            inside = (events["t"] >= start) & (events["t"] < start + 10_000)
            assert sample["start"] == start and inside.sum() > 50
            for column in "txyp":
                np.testing.assert_array_equal(
                    sample["events"][column] + start * (column == "t"), events[column][inside]
                )
    for asked, why in (
        (dict(window=20), "window 10.0: remove .* got window 20"),
        (dict(size=(64, 64)), "size .128, 128."),
        (dict(rate=8000), "rate None: remove .* got rate 8000"),
    ):
        with pytest.raises(ValueError, match=f"cups is prepared in .* with {why}"):
            catalog.prepare("cups", tmp_path / "data", manual=tmp_path, **asked)


EVENT_FAULTS = {
    "outside the camera": (["far.npz,cup,train"], r"line 5, .*far.npz: event 4 has x = 128, outside 0..127"),
    "no time": (["timeless.npz,cup,train"], r"line 5, .*timeless.npz: has no array t; it has x, y, p"),
    "seconds": (["seconds.npz,cup,train"], r"line 5, .*seconds.npz: event 1 has t = .*multiply seconds by 1e6"),
    "texts": (["texts.npz,cup,train"], r"line 5, .*texts.npz: column t must be whole numbers; got dtype <U"),
    "times go back": (["back.npz,cup,train"], r"line 5, .*back.npz: event 1 has t"),
    "another format": (["text.aedat,cup,train"], r"line 5, .*text.aedat: wrong magic"),
    "too short": (
        ["short.npz,cup,train"],
        r"line 5, .*short.npz: its 100 microseconds are less than a window of 10000",
    ),
}


@pytest.mark.parametrize("fault", EVENT_FAULTS)
def test_a_fault_of_events_names_file_and_line(tmp_path, fault):
    rows, why = EVENT_FAULTS[fault]
    a, _, _ = own_events(tmp_path, *rows)
    root = tmp_path / "cups"
    np.savez(root / "far.npz", **(a | {"x": np.where(np.arange(300) == 4, 128, a["x"])}))
    np.savez(root / "timeless.npz", **{column: a[column] for column in "xyp"})
    np.savez(root / "seconds.npz", **(a | {"t": np.arange(300) * 0.013}))
    np.savez(root / "texts.npz", **(a | {"t": a["t"].astype(str)}))
    np.savez(root / "back.npz", **(a | {"t": a["t"][::-1]}))
    np.savez(root / "short.npz", **(a | {"t": np.arange(300) // 3}))
    (root / "text.aedat").write_text("no events")
    with pytest.raises(ev.BadSample, match=f"split.csv, {why}"):
        catalog.prepare("cups", tmp_path / "data", manual=tmp_path, size=(128, 128), window=10)
    assert not left_behind(tmp_path / "data")


def test_events_in_npz_need_the_size_of_the_camera(tmp_path):
    own_events(tmp_path)
    with pytest.raises(
        ValueError, match=r"size must be the \(H, W\) of the camera of .*a.npz, such as --size 128; got None"
    ):
        catalog.prepare("cups", tmp_path / "data", manual=tmp_path)
    for window, size, why in (
        (np.inf, (128, 128), "window must be from 0.001 to 4294967 milliseconds; got inf"),
        (np.nan, (128, 128), "window must be .*; got nan"),
        (10, (-128, 128), r"size must be \(H, W\), each at least 1; got \(-128, 128\)"),
    ):
        with pytest.raises(ValueError, match=why):
            catalog.prepare("cups", tmp_path / "data", manual=tmp_path, size=size, window=window)
    table(tmp_path / "odd", "a.txt,cup,train")
    (tmp_path / "odd" / "a.txt").write_text("1")
    with pytest.raises(ValueError, match=r"line 2: a.txt must be a .wav, .npy, .npz or .aedat file"):
        catalog.prepare("odd", tmp_path / "data", manual=tmp_path)


def test_a_whole_recording_is_a_sample_and_a_part_is_in_microseconds(tmp_path):
    root = table(
        tmp_path / "cups", "a.npz,cup,train,2000,9000", "a.npz,mug,test,9000,40000", head="file,label,split,start,stop"
    )
    a = recording(300, 0, DVS, span=35_000, start=1000)
    np.savez(root / "a.npz", **(a | {"p": 2 * a["p"] - 1}))
    catalog.prepare("cups", tmp_path / "data", manual=tmp_path, size=(128, 128))
    (first,) = catalog.source("cups", "train", tmp_path / "data")
    inside = (a["t"] >= 2000) & (a["t"] < 9000)
    np.testing.assert_array_equal(first["events"]["t"] + 2000, a["t"][inside])
    np.testing.assert_array_equal(first["events"]["p"], a["p"][inside])
    with open(root / "split.csv", "a") as file:
        file.write("\na.npz,cup,train,90000,99000\n")
    with pytest.raises(ev.BadSample, match=r"start and stop, 90000 and 99000, leave no event.*from \d+ to \d+ micro"):
        catalog.prepare("cups", tmp_path / "more", manual=tmp_path, size=(128, 128))


def test_dvs128_objects_are_windows_of_100_ms(tmp_path):
    found = catalog.data_set("dvs128_objects")
    clone, one = tmp_path / "clone" / "dvs128_objects", tmp_path / "file" / "dvs128_objects"
    one.mkdir(parents=True)
    names = [(s, f) for s, f in (("test", found.FILES), ("train", (*found.FILES, "Estilete_1"))) for f in f]
    classes = ["cube", *found.LABELS]
    events, labels, series = [], [], []
    for i, (split, name) in enumerate(names):
        made = recording(400, i, DVS, span=250_000)
        made["t"] = made["t"] - made["t"][0]
        path = clone / found.SERIES[split] / f"{name}.aedat"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(write_aedat2(made | {"x": made["y"], "y": made["x"]}))
        events.append(made)
        labels.append(1 + found.FILES.index(name.split("_")[0]))
        series.append(int(split == "train"))
    events.append(recording(50, 0, DVS))  # a cube, which is left out
    arrays = {column: np.concatenate([made[column] for made in events]) for column in "txyp"}
    offsets = np.cumsum([0, *(len(made["t"]) for made in events)])
    np.savez(one / "events.npz", **arrays, offsets=offsets, label=[*labels, 0], series=[*series, 0], classes=classes)
    for form in ("clone", "file"):
        catalog.prepare("dvs128_objects", tmp_path / f"{form} data", manual=tmp_path / form)
        source = catalog.source("dvs128_objects", "test", tmp_path / f"{form} data")
        assert [int(s["label"]) for s in source] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        inside = (events[0]["t"] >= 100_000) & (events[0]["t"] < 200_000)
        np.testing.assert_array_equal(source[1]["events"]["x"], events[0]["x"][inside])
        np.testing.assert_array_equal(source[1]["events"]["t"] + 100_000, events[0]["t"][inside])
        assert len(catalog.source("dvs128_objects", "train", tmp_path / f"{form} data")) == 12
    (clone / found.SERIES["train"] / "Tesoura.aedat").unlink()
    with pytest.raises(ev.BadSample, match="there is no file NeuromorphicObjectDataSet_100/aedatFiles/Tesoura.aedat"):
        catalog.prepare("dvs128_objects", tmp_path / "again", manual=tmp_path / "clone")
    assert not left_behind(tmp_path / "again")
    with pytest.raises(archives.Missing, match="dvs128_objects needs events.npz in .*github.com/eberlawrence"):
        catalog.prepare("dvs128_objects", tmp_path / "again", manual=tmp_path)


def test_both_aedat_versions_have_the_axes_of_jaer():
    events = recording(50, 0, DVS)
    second, third = formats.read_aedat(write_aedat2(events), "2"), formats.read_aedat(write_aedat3(events), "3")
    np.testing.assert_array_equal(second["x"], events["y"])  # `write_aedat2` writes what CIFAR10-DVS has
    np.testing.assert_array_equal(third["x"], events["x"])
