"""Inputs and networks for events and signals in the experiments: what they make of a recording, and short runs."""

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

pytest.importorskip("tensorflow_datasets", reason="the experiments need the extra `data`")
import inputs.recordings
import inputs.signals
import train
from inputs import DATASETS, Audio, Signals
from inputs.recordings import two_windows
from models import MODELS
from test_data_formats import recording

from snnfuse.data import archives, catalog
from snnfuse.data import events as ev

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning")  # Orbax has its own
KEY = jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
    """Gestures of two people: one channel is strong in each class. Signals of the second person are ten times as strong."""
    folder = tmp_path_factory.mktemp("recordings")
    root, rng = folder / "gestures", np.random.default_rng(0)
    root.mkdir()
    rows = ["file,label,split,person"]
    for i in range(24):
        label, person = i % 2, i // 2 % 2
        xs = rng.normal(0, 1, (120, 2)) * np.array([3.0, 1.0] if label else [1.0, 3.0]) * 10**person
        np.save(root / f"{i}.npy", xs.astype(np.float32))
        rows.append(f"{i}.npy,{label},{'test' if i > 15 else 'train'},{'ab'[person]}")
    (root / "split.csv").write_text("\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        catalog.prepare("gestures", manual=folder)
        yield


def gestures(**choices):
    return Signals("gestures", size=100, width=20, **choices)


def test_signals_relative_to_a_person_do_not_show_how_strong_the_person_is():
    plain, relative = gestures().sources(), gestures(relative_to=("person",)).sources()
    strength = lambda sources, person: np.mean([s["signal"].std() for s in sources[1] if s["person"] == person])
    assert strength(plain, b"b") > 8 * strength(plain, b"a")
    assert strength(relative, b"b") == pytest.approx(strength(relative, b"a"), rel=0.1)
    both = np.concatenate([s["signal"] for source in relative for s in source if s["person"] == b"a"])
    np.testing.assert_allclose(np.square(both).mean(0), 1, rtol=1e-4)
    with pytest.raises(archives.Missing, match="--data.relative_to must be columns of gestures; got 'day'"):
        gestures(relative_to=("day",)).sources()


def test_signals_that_are_all_0_are_refused(monkeypatch):
    silent = lambda name: [[{"signal": np.zeros((100, 2), np.float32), "label": 0}]] * 2
    monkeypatch.setattr(inputs.signals, "train_and_test", silent)
    with pytest.raises(archives.Missing, match="the training signals of gestures are all 0"):
        gestures().sources()


def test_signals_become_windows_and_training_ones_change():
    data = gestures(early=20, gain=0.5, noise=0.1)
    batch = {"signal": jnp.asarray(np.random.default_rng(1).normal(0, 1, (3, 120, 2)), jnp.float32)}
    changed, _ = data.augment(KEY, batch, jnp.zeros((3, 2)))
    assert changed["signal"].shape == (3, 100, 2)
    for code, shape in (("level", (9, 3, 2)), ("level_crossing", (9, 3, 2, 2)), ("lif", (9, 3, 2))):
        assert dataclasses.replace(data, code=code).encode(KEY, changed, 9).shape == shape
    spikes = dataclasses.replace(data, code="lif").encode(KEY, changed, 9)
    assert set(np.unique(spikes)) == {0, 1} and 0.2 < spikes.mean() < 0.95
    level = data.encode(KEY, batch, 9)
    np.testing.assert_allclose(
        level[1, 0], np.log(0.01 + np.sqrt(np.square(batch["signal"][0, 10:30]).mean(0))), rtol=1e-4
    )
    assert dataclasses.replace(data, width=data.size).encode(KEY, batch, 1).shape == (1, 3, 2)
    with pytest.raises(ValueError, match="--model.T must be at most --data.size - --data.width .*; got 99"):
        data.encode(KEY, batch, 99)
    with pytest.raises(ValueError, match="--data.width must be at most --data.size, 100; got 101"):
        dataclasses.replace(data, width=101)


def test_events_are_changed_before_they_become_frames():
    data = dataclasses.replace(DATASETS["nmnist"], bins=4, store="events", events=128, channels=None, split="time")
    example = data.example()({"events": recording(100, 0, ev.Sensor(34, 34)), "label": 1}, np.random.default_rng(0))
    batch = {"frames": jnp.asarray(example["frames"])[None]}
    frames = data.encode(KEY, batch, 5)
    assert frames.shape == (5, 1, 34, 34, 2) and frames.sum() == 100 and frames[4].sum() == 0
    np.testing.assert_allclose(dataclasses.replace(data, log=True).encode(KEY, batch, 5), np.log1p(frames), rtol=1e-6)
    held = dataclasses.replace(data, hold=True).encode(KEY, batch, 6)
    np.testing.assert_array_equal(held, np.concatenate([frames[:4], frames[3:4], frames[3:4]]))
    small = dataclasses.replace(data, size=17)
    np.testing.assert_array_equal(small.encode(KEY, batch, 4), frames[:4].reshape(4, 1, 17, 2, 17, 2, 2).sum((3, 5)))
    same, _ = data.augment(KEY, batch, jnp.zeros((1, 10)))
    assert same["frames"] is batch["frames"]
    for name, value in (("shift", 5.0), ("scale", 0.5), ("turn", 90.0), ("drop", 0.9)):
        changed, _ = dataclasses.replace(data, **{name: value}).augment(KEY, batch, jnp.zeros((1, 10)))
        made = data.encode(KEY, changed, 4)
        assert 5 < made.sum() <= 100 and not np.array_equal(made, frames[:4]), name
    with pytest.raises(ValueError, match="--data.drop must be at least 0, and at most 1; got 2"):
        dataclasses.replace(data, drop=2.0)


def test_a_first_T_below_the_frames_of_a_recording_is_named(monkeypatch):
    sensor = ev.Sensor(34, 34)
    data = dataclasses.replace(DATASETS["nmnist"], bins=4, store="events", events=128)
    config = dataclasses.replace(train.Config(), data=data, first_T=2, first_steps=10, batch=1)
    source = [{"events": recording(100, 0, sensor), "label": 1}]
    monkeypatch.setattr(inputs.recordings, "train_and_test", lambda name: (source, source))
    said = "--first_T 2 stands for --model.T in the first steps: --model.T must be at least --data.bins, 4; got 2"
    with pytest.raises(train.Stopped, match=said):
        train._input_shape(config, source)


def test_two_windows_are_those_that_follow_one_another():
    def window(start, label, times):
        return {
            "start": np.int64(start),
            "label": label,
            "events": {"t": np.array(times, np.uint32), "x": np.array(times) % 7},
        }

    samples = [window(0, 1, [1, 5]), window(10, 1, [0, 9]), window(20, 2, [3]), window(50, 2, [4])]
    (both,) = two_windows(samples, 10)
    assert both["events"]["t"].tolist() == [1, 5, 10, 19] and both["events"]["x"].tolist() == [1, 5, 0, 2]
    data = dataclasses.replace(DATASETS["dvs128_objects"], store="events", longer=0.5)
    assert catalog.data_set(data.name).WINDOW == 100_000
    with pytest.raises(ValueError, match="--data.longer must be None .* cut into windows; got 0.5 for nmnist"):
        dataclasses.replace(DATASETS["nmnist"], store="events", longer=0.5)


def test_sound_is_mixed_with_its_targets_and_gets_noise():
    sound = jnp.asarray(np.random.default_rng(0).integers(-9000, 9000, (4, 800)).astype(np.int16))
    targets = jax.nn.one_hot(jnp.arange(4), 4)
    batch, mixed = Audio("speech_commands", mixup=0.5).augment(KEY, {"audio": sound}, targets)
    share = float(mixed[0, 0])
    assert 0 < share < 1 and float(mixed[0, 3]) == pytest.approx(1 - share, abs=1e-6)
    want = (share * sound[0] + (1 - share) * sound[3]) / 2**15
    np.testing.assert_allclose(batch["audio"][0], want, atol=1e-5)
    noisy, same = Audio("speech_commands", noise=10.0).augment(KEY, {"audio": sound}, targets)
    assert same is targets
    decibels = -20 * np.log10((noisy["audio"] - sound / 2**15).std(-1) / (np.abs(sound / 2**15).max(-1)))
    assert (decibels > 9).all() and (decibels < 61).all() and np.ptp(decibels) > 5


@pytest.mark.parametrize("shape", [(9,), (9, 2)])
def test_timeconv_takes_bands_with_and_without_channels(shape):
    model = dataclasses.replace(MODELS["timeconv"], channels=(4, 6), hidden=(8,), recurrent=True, dropout=0.1)
    network = model.build(shape, 5, nnx.Rngs(0))
    outs = nnx.eval_shape(lambda network, xs: network(xs)[0], network, jnp.zeros((7, 3, *shape)))
    assert outs.shape == (7, 3, 5)
    with pytest.raises(ValueError, match="--model.bands odd; got 5 and 4"):
        dataclasses.replace(model, bands=4)


def test_a_run_learns_which_channel_is_strong(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "gestures", Signals("gestures"))
    options = ["--data=gestures", "--data.size=100", "--data.width=20", "--data.gain=0.2", "--model=recurrent"]
    options += ["--model.no_recurrent", "--model.T=5", "--model.hidden", "16", "--learning_rate=1e-2", "--steps=60"]
    options += ["--batch=8", "--eval_every=60", f"--out={tmp_path}", "--name=run"]
    options += ["--rates", "--rate_upper=0.05", "--rate_lower=0.01", "--rate_per=layer"]
    with warnings.catch_warnings():  # a mark of this test would not win over that of the file
        # few neurons fire; a name far from them left no room for the axes
        warnings.filterwarnings("error", "constrained_layout")
        assert train.main(options) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["held_out_accuracy"] == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (rate,) = [value for name, value in rows[-1].items() if name.startswith("eval_rate ")]
    assert 0.005 < rate < 0.07
    for picture in ("report.png", "mistakes.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 10_000


def test_punished_rates_must_be_a_band():
    with pytest.raises(ValueError, match="--rate_lower must be from 0 to --rate_upper; got 0.5 and 0.2"):
        dataclasses.replace(train.Config(), rate_lower=0.5, rate_upper=0.2)
    with pytest.raises(ValueError, match="--rate_per must be neuron, channel or layer.*; got 'lane' and 1.0"):
        dataclasses.replace(train.Config(), rate_per="lane")
