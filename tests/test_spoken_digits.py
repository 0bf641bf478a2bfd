"""The experiment with sound: its inputs, its augmentation, a speaker held out, and a short run of the recurrent network."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

pytest.importorskip("tensorflow_datasets", reason="the experiments need the extra `data`")
import digits_of_others
import spoken_digits
import train
from inputs import DATASETS, Audio
from runs import Stopped
from test_data_audio import chirp, own_folder, wav

from snnfuse.data import archives, catalog

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning")  # Orbax has its own
SPEAKERS = ("george", "lucas", "theo")


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
    """Two digits, each a chirp up or down, by three speakers, and a folder of one's own."""
    folder = tmp_path_factory.mktemp("sounds")
    recordings = folder / "spoken_digits" / "recordings"
    recordings.mkdir(parents=True)
    for digit in (0, 1):
        for s, speaker in enumerate(SPEAKERS):
            for index in (0, 4, 5, 6, 7):
                sound = chirp(2000 + 100 * s + 10 * index)[:: 1 - 2 * digit]
                (recordings / f"{digit}_{speaker}_{index}.wav").write_bytes(wav(sound))
    own_folder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        for name in ("spoken_digits", "words"):
            catalog.prepare(name, manual=folder)
        yield


DIGITS = DATASETS["spoken_digits"]


def whole(data) -> dict:
    batch = next(iter(train.in_order(dataclasses.replace(train.Config(), data=data), data.sources()[1], 12)))
    return {name: jnp.asarray(x) for name, x in batch.items()}


def test_a_speaker_is_on_one_side_only():
    train_source, test_source = DIGITS.sources()
    assert (len(train_source), len(test_source)) == (18, 12)
    train_source, test_source = dataclasses.replace(DIGITS, held_out="theo").sources()
    assert {s["speaker"] for s in test_source} == {b"theo"} and len(test_source) == 10
    assert {s["speaker"] for s in train_source} == {b"george", b"lucas"} and len(train_source) == 20
    with pytest.raises(
        archives.Missing, match="must be a speaker of spoken_digits, such as george, lucas, theo; got 'Theo'"
    ):
        dataclasses.replace(DIGITS, held_out="Theo").sources()


def test_recordings_of_another_set_train_too_if_their_labels_are_of_this_set(monkeypatch):
    data = dataclasses.replace(DIGITS, held_out="theo", also="words")
    with pytest.raises(archives.Missing, match="--data.also must have labels of spoken_digits; words has none of them"):
        data.sources()
    monkeypatch.setattr(catalog.data_set("spoken_digits"), "LABELS", ("yes", "1"))
    train_source, test_source = data.sources()
    alone, _ = dataclasses.replace(data, also=None).sources()
    assert len(test_source) == 10 and len(train_source) == len(alone) + 1
    assert train_source[-1]["label"] == 0 and train_source[-1]["room"] == b"hall"


def test_digits_of_others_are_the_loud_parts_of_unknown_words(tmp_path):
    source, words = tmp_path / "speech_commands" / "_unknown_", tmp_path / "digits_of_others"
    source.mkdir(parents=True)
    quiet = np.zeros(2000, np.int16)
    for name in ("two_a1_nohash_0", "tree_a1_nohash_0", "nine_b2_nohash_1"):
        (source / f"{name}.wav").write_bytes(wav(np.concatenate([quiet, chirp(1600), quiet])))
    assert digits_of_others.main(source.parent, words) == 2
    head, nine, two = (words / "split.csv").read_text().splitlines()
    assert head == "file,label,speaker,split,start,stop" and nine.startswith("nine_b2_nohash_1.wav,9,b2,train,")
    start, stop = map(int, two.split(",")[-2:])
    assert 1400 <= start < 2000 and 3600 < stop <= 4200
    assert digits_of_others.loud(quiet, 8000) == (0, 2000)
    catalog.prepare("digits_of_others", tmp_path / "data", manual=tmp_path)
    (one, _) = catalog.source("digits_of_others", "train", tmp_path / "data")
    assert one["speaker"] == b"b2" and len(one["audio"]) == stop - start


@pytest.mark.parametrize("code, width", [("bands", (40,)), ("level_crossing", (40, 2)), ("lif", (40,))])
def test_a_recording_has_as_many_steps_as_the_model(code, width):
    data = dataclasses.replace(DIGITS, code=code, centre=0.0)
    batch = whole(data)
    for T in (20, 39):
        xs = data.encode(jax.random.key(0), batch, T)
        assert xs.shape == (T, 12, *width) and xs.dtype == jnp.float32
        assert float(xs[: T // 2].mean()) > 0.01 and float(xs[-T // 2 :].mean()) < float(xs.mean())  # silence follows
        assert code == "bands" or (xs == jnp.round(xs)).all()


def test_augmentation_changes_what_its_options_say():
    batch, key, T = whole(DIGITS), jax.random.key(1), 20
    plain = DIGITS.encode(key, batch, T)
    for options in (
        dict(shift=0.05),
        dict(speed=0.2),
        dict(tempo=0.2),
        dict(pitch=3.0),
        dict(warp=0.2),
        dict(mask_steps=5, mask_bands=8),
    ):
        data = dataclasses.replace(DIGITS, **options)
        changed, targets = data.augment(key, batch, jnp.ones((12, 10)))
        got = data.encode(key, changed, T)
        assert got.shape == plain.shape and (targets == 1).all()
        assert 0.001 < float(jnp.abs(got - plain).mean()) < 0.3, options
        assert jnp.array_equal(got, data.encode(key, data.augment(key, batch, targets)[0], T))
    np.testing.assert_array_equal(DIGITS.encode(key, DIGITS.augment(key, batch, targets)[0], T), plain)


def test_a_fitted_word_does_not_depend_on_the_silence_around_it():
    data, batch, T = dataclasses.replace(DIGITS, fit=True, centre=0.0, envelope=20), whole(DIGITS), 20
    moved = lambda windows: (
        batch | {"audio": jnp.roll(batch["audio"], 104 * windows, -1)}
    )  # 104 samples between windows
    word, later = (data.encode(jax.random.key(0), moved(windows), T) for windows in (3, 9))
    assert float(word[-1].max()) > 0.1 < float(word.std()) and word.shape == (T, 12, 40)
    np.testing.assert_allclose(later, word, atol=1e-4)


def test_your_own_folder_is_an_input():
    data = Audio("words")
    assert data.classes == 2 and data.rate == 8000 and [len(source) for source in data.sources()] == [2, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(code="delta"), "--data.code must be bands, level_crossing or lif; got 'delta'"),
        (dict(seconds=0), "--data.seconds must be above 0; got 0"),
        (dict(envelope=-1), "--data.envelope must be at least 0 and finite; got -1"),
        (dict(envelope=41), "--data.envelope must be at most 40; got 41"),
        (dict(quiet=1.5), "--data.quiet must be at most 1; got 1.5"),
        (dict(warp=-1.0), "--data.warp must be at least 0 and finite; got -1"),
        (dict(pitch=-1.0), "--data.pitch must be at least 0 and finite; got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DIGITS, **options)


@pytest.mark.parametrize("recurrent", [True, False])
def test_a_short_run_learns(tmp_path, recurrent, monkeypatch):
    if not recurrent:
        monkeypatch.setattr(train.report, "draw", lambda *_: "no picture")
    options = ["--steps=40", "--eval_every=40", "--batch=6", "--model.T=12", "--model.hidden=12", "--data.bands=16"]
    options += [
        "--data.shift=0.02",
        "--data.centre=0",
        "--model.recurrent" if recurrent else "--model.no_recurrent",
        f"--out={tmp_path}",
    ]
    more = ["--data.held_out=theo", "--data.code=level_crossing", "--model.channels=3"]
    options += more if recurrent else ["--model.max_delay=3", "--piece=8", "--truncate"]
    assert train.main([*spoken_digits.DEFAULTS, *options]) == 0
    summary = json.loads((tmp_path / "spoken_digits" / "summary.json").read_text())
    assert summary["held_out_accuracy"] >= 0.8
    assert not recurrent or (tmp_path / "spoken_digits" / "report.png").stat().st_size > 10_000
    saved = json.loads((tmp_path / "spoken_digits" / "config.json").read_text())
    assert saved["model.recurrent"] is recurrent


def test_a_model_that_cannot_take_sound_says_so():
    config = dataclasses.replace(train.Config(), data=DIGITS)
    with pytest.raises((Stopped, ValueError)):
        train.create(config, train._input_shape(config, DIGITS.sources()[0]), 10)
