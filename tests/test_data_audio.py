"""Audio: mel bands against NumPy and librosa, the coders against loops, what the random changes do, and the data sets."""

import io
import json
import wave
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_data_formats import left_behind

from snnfuse.data import archives, audio, catalog, encoders, formats, loader
from snnfuse.data import events as ev
from snnfuse.data.builders.audio import read_table

KEY = jax.random.key(0)
RATE = 8000


def chirp(n: int = 1200) -> np.ndarray:
    t = np.arange(n) / RATE
    return (0.3 * np.sin(2 * np.pi * (300 * t + 6000 * t**2)) * 2**15).astype(np.int16)


# ---- mel bands


@pytest.mark.parametrize(
    "rate, window, bands, low, high", [(8000, 256, 40, 100.0, None), (16000, 512, 64, 0.0, 7600.0)]
)
def test_mel_filters_are_those_of_librosa(rate, window, bands, low, high):
    librosa = pytest.importorskip("librosa", reason="librosa is only compared with")
    theirs = librosa.filters.mel(sr=rate, n_fft=window, n_mels=bands, fmin=low, fmax=high, htk=True, norm=None)
    ours = audio.mel_filters(rate, window, bands, low, high)
    assert ours.shape == (window // 2 + 1, bands)
    np.testing.assert_allclose(ours, theirs.T, atol=2e-6)


def test_log_mel_is_the_equation():
    sound = np.stack([chirp(), chirp()[::-1]])
    got = audio.log_mel(sound, RATE, window=64, hop=50, bands=12, low=50.0)
    M = audio.mel_filters(RATE, 64, 12, 50.0).astype(float)
    j = np.arange(64)
    hann = np.sin(np.pi * j / 64) ** 2
    fourier = np.exp(-2j * np.pi * np.outer(j, np.arange(33)) / 64)
    T = 1 + (1200 - 64) // 50
    want = np.empty((T, 2, 12))
    for t in range(T):
        power = np.abs((sound[:, 50 * t : 50 * t + 64] / 2**15 * hann) @ fourier) ** 2
        want[t] = np.log(1e-6 + power @ M)
    assert got.shape == want.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(
        audio.log_mel(sound[0], RATE, window=64, hop=50, bands=12, low=50.0), got[:, 0], atol=1e-6
    )
    np.testing.assert_allclose(
        audio.log_mel(sound / np.float32(2**15), RATE, window=64, hop=50, bands=12, low=50.0), got
    )


def test_loudness_is_between_0_and_1_and_takes_the_gain_out():
    sound = chirp().astype(np.float32) / 2**15
    make = lambda x: audio.loudness(audio.log_mel(x, RATE, window=64, hop=50, bands=12, low=50.0, floor=1e-12))
    level = make(sound)
    assert float(level.max()) == 1 and float(level.min()) == 0 and 0.1 < float(level.mean()) < 0.9
    np.testing.assert_allclose(make(0.1 * sound), level, atol=1e-4)


def test_centre_takes_a_constant_colour_out():
    bands, colour = jax.random.uniform(KEY, (30, 2, 12)), jnp.linspace(-0.3, 0.3, 12)  # of mean 0, so the weights stay
    plain, coloured = audio.centre(bands), audio.centre(bands + colour)
    np.testing.assert_allclose(plain, coloured, atol=1e-6)
    w = np.square(np.asarray(bands, np.float64).mean(-1, keepdims=True))
    want = bands - 0.5 * (bands * w).sum(0) / w.sum(0)
    np.testing.assert_allclose(audio.centre(bands, 0.5), want, atol=1e-6)
    np.testing.assert_array_equal(audio.centre(jnp.zeros((3, 1, 4))), np.zeros((3, 1, 4)))
    with pytest.raises(ValueError, match=r"part must be in \[0, 1\]; got 2"):
        audio.centre(bands, 2.0)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (ValueError, "low and high must be", lambda: audio.mel_filters(RATE, 64, 12, 0.0, 5000.0)),
        (ValueError, "band 0 of 40 has no frequency", lambda: audio.mel_filters(RATE, 64, 40)),
        (ValueError, "window must be at most the 50 samples", lambda: audio.log_mel(chirp(50), RATE)),
        (TypeError, "sound must be int16 or floating; got uint8", lambda: audio.log_mel(np.zeros(300, np.uint8), RATE)),
        (ValueError, "range must be above 0", lambda: audio.loudness(jnp.ones((2, 3)), 0.0)),
        (ValueError, "threshold must be positive", lambda: encoders.level_crossing(jnp.ones(3), 0.0)),
        (ValueError, "xs must have at least one step", lambda: encoders.lif(jnp.ones((0, 3)))),
    ],
)
def test_what_is_refused(error, match, call):
    with pytest.raises(error, match=match):
        call()


# ---- spikes


def test_level_crossings_are_the_loop_and_follow_the_signal():
    xs = np.asarray(jax.random.normal(KEY, (30, 2, 5)).cumsum(0), np.float32) * 0.3
    step = 0.25  # a power of two: no rounding
    got = encoders.level_crossing(xs, step)
    level, want = xs[0].copy(), np.zeros((30, 2, 5, 2))
    for t, x in enumerate(xs):
        want[t, ..., 0] = np.maximum(0, np.floor((x - level) / step))
        want[t, ..., 1] = np.maximum(0, np.floor((level - x) / step))
        level += step * (want[t, ..., 0] - want[t, ..., 1])
    np.testing.assert_array_equal(got, want)
    assert want[..., 0].sum() > 20 < want[..., 1].sum() and want.max() > 1
    followed = xs[0] + step * (got[..., 0] - got[..., 1]).cumsum(0)
    assert np.abs(followed - xs).max() < step
    np.testing.assert_array_equal(encoders.level_crossing(xs, step, two_sided=False, dtype=jnp.int8), want[..., 0])


def test_a_slow_change_is_a_level_crossing_and_no_delta():
    ramp = jnp.arange(32) / 32
    assert float(encoders.delta(ramp, 0.125).sum()) == 0
    assert encoders.level_crossing(ramp, 0.125).sum(0).tolist() == [7.0, 0.0]


def test_lif_code_is_the_loop_and_its_rate_the_signal():
    xs = np.asarray(jax.random.uniform(KEY, (40, 6)), np.float32)
    v, want = np.zeros(6, np.float32), []
    for x in xs:
        u = np.float32(0.5) * v + x
        want.append(u >= 1)
        v = u - want[-1]
    np.testing.assert_array_equal(encoders.lif(xs, 0.5), np.stack(want))
    rates = encoders.lif(jnp.tile(jnp.linspace(0, 1, 5), (400, 1)), 1.0).mean(0)
    np.testing.assert_allclose(rates, np.linspace(0, 1, 5), atol=0.01)


# ---- random changes


SOUND = np.stack([np.roll(chirp(600), 50 * i) for i in range(8)])
BANDS = jax.random.uniform(KEY, (20, 8, 12)) + 0.1


def test_shift_moves_each_recording_and_silence_comes_in():
    moved = np.asarray(audio.shift(KEY, jnp.asarray(SOUND), 40))
    padded = np.pad(SOUND, ((0, 0), (40, 40)))
    starts = [[at for at in range(81) if np.array_equal(padded[i, at : at + 600], moved[i])] for i in range(8)]
    assert all(len(at) == 1 for at in starts) and len({at[0] for at in starts}) > 4


def test_speed_resamples_by_at_most_its_factor():
    t = np.arange(4000)
    tone = jnp.asarray(np.sin(2 * np.pi * 0.05 * t)[None].repeat(50, 0), jnp.float32)
    made = np.asarray(audio.speed(KEY, tone, 0.25))[:, :3000]
    pitch = np.abs(np.fft.rfft(made * np.hanning(3000))).argmax(-1) / 3000 / 0.05
    assert 1 / 1.26 < pitch.min() < 0.9 and 1.1 < pitch.max() < 1.26


def test_noise_is_as_loud_as_asked():
    tone = jnp.asarray(np.sin(np.arange(4000) * 0.3)[None].repeat(20, 0), jnp.float32)
    added = np.asarray(audio.noise(KEY, tone, 20.0, 40.0) - tone)
    decibels = -20 * np.log10(added.std(-1))
    assert 19.5 < decibels.min() < 25 and 35 < decibels.max() < 40.5


def test_stretch_interpolates_between_places():
    ramp = jnp.broadcast_to(jnp.arange(20.0)[:, None, None], (20, 8, 12))
    slower = np.asarray(audio.stretch(KEY, ramp, steps=0.5))
    factor = slower[1, :, 0]
    assert 1 / 1.5 <= factor.min() < 0.9 and 1.1 < factor.max() <= 1.5
    np.testing.assert_allclose(
        slower, np.minimum(19, np.arange(20)[:, None] * factor)[..., None].repeat(12, 2), rtol=1e-5
    )
    across = jnp.broadcast_to(jnp.arange(12.0), (20, 8, 12))
    higher = np.asarray(audio.stretch(KEY, across, pitch=3.0))
    moved = higher[0, :, 5] - 5
    assert -3 <= moved.min() < -1 and 0.5 < moved.max() <= 3
    np.testing.assert_allclose(higher[7], np.clip(np.arange(12) + moved[:, None], 0, 11), atol=1e-5)
    np.testing.assert_array_equal(audio.stretch(KEY, BANDS), BANDS)


def test_fit_plays_the_loud_part_in_all_steps():
    ramp = np.broadcast_to(np.arange(20.0)[:, None, None], (20, 3, 2)).copy()
    ramp[:, 0] = np.where((ramp[:, 0] >= 4) & (ramp[:, 0] <= 13), ramp[:, 0], 0)
    ramp[:, 1] = 0  # silence is taken whole
    made = np.asarray(audio.fit(jnp.asarray(ramp, jnp.float32), 7, 2.5))
    np.testing.assert_allclose(made[:, 0, 1], np.linspace(4, 13, 7), rtol=1e-6)
    np.testing.assert_allclose(made[:, 2, 1], np.linspace(3, 19, 7), rtol=1e-6)
    assert made.shape == (7, 3, 2) and not made[:, 1].any()


def test_envelope_keeps_the_slow_cosines_alone():
    K, i = 12, np.arange(12)[:, None]
    cosines = np.cos(np.pi / K * i * (np.arange(K) + 0.5)).astype(np.float32)
    made = audio.envelope(jnp.asarray(cosines), 5)
    np.testing.assert_allclose(made, np.where(i < 5, cosines, 0), atol=1e-5)
    with pytest.raises(ValueError, match="count must be at most the number of bands, the last axis; got 13"):
        audio.envelope(jnp.asarray(cosines), 13)


def test_warp_multiplies_frequencies_by_one_factor():
    K, low = 24, 100.0
    mel = np.linspace(*(2595 * np.log10(1 + np.array([low, RATE / 2]) / 700)), K + 2)[1:-1]
    made = np.asarray(audio.warp(KEY, jnp.broadcast_to(jnp.asarray(mel, jnp.float32), (3, 64, K)), 0.2, RATE, low=low))
    hertz = lambda mel: 700 * (10 ** (mel / 2595) - 1)
    factors = (hertz(made) / hertz(mel))[0, :, 6:-6]  # beyond the first and the last band it repeats them
    assert 1 / 1.2 <= factors.min() < 0.87 and 1.15 < factors.max() <= 1.2001 and len(np.unique(factors[:, 0])) == 64
    np.testing.assert_allclose(factors, factors[:, :1].repeat(K - 12, 1), rtol=1e-3)
    np.testing.assert_allclose(audio.warp(KEY, BANDS, 0.0, RATE), BANDS, atol=1e-5)


def test_mask_hides_whole_steps_and_whole_bands():
    made = np.asarray(audio.mask(KEY, BANDS, steps=6, width=4, count=2))
    hidden = made == 0
    rows, columns = hidden.all(2), hidden.all(0)  # [T, B], [B, K]
    np.testing.assert_array_equal(hidden, rows[:, :, None] | columns[None])
    np.testing.assert_array_equal(made[~hidden], np.asarray(BANDS)[~hidden])
    assert 0 < rows.sum(0).max() <= 12 and 0 < columns.sum(1).max() <= 8
    assert len(set(rows.sum(0).tolist())) > 2


def test_all_of_it_is_keyed_and_runs_in_one_jitted_function():
    @jax.jit
    def make(key, sound):
        keys = jax.random.split(key, 5)
        sound = audio.noise(keys[0], audio.speed(keys[1], audio.shift(keys[2], sound, 20), 0.1), 20.0, 40.0)
        level = audio.loudness(audio.log_mel(sound, RATE, window=64, hop=50, bands=12, low=50.0))
        level = audio.mask(keys[3], audio.stretch(keys[4], level, 0.1, 1.0), 3, 3)
        return encoders.level_crossing(level, 0.1)

    a, b, c = make(KEY, SOUND), make(KEY, SOUND), make(jax.random.key(1), SOUND)
    assert a.shape == (11, 8, 12, 2) and jnp.array_equal(a, b) and not jnp.array_equal(a, c)


# ---- files and data sets


def wav(samples, rate: int = RATE, width: int = 2, channels: int = 1) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, f"<i{width}").tobytes())
    return out.getvalue()


def test_wav_files_are_read_or_named():
    samples, rate = formats.read_wav(wav(chirp()), "a")
    assert rate == RATE and samples.dtype == np.int16 and np.array_equal(samples, chirp())
    for data, why in [
        (wav(chirp())[:-100], "truncated: 2300 bytes of sound, but its header says 2400"),
        (wav(chirp())[:30], "truncated"),
        (b"RIFFnonsense", "no .wav file"),
        (b"hello", "no .wav file that is read here, or a truncated one: it ends in its header"),
        (wav(chirp(), width=4), "1 channels of 32 bits"),
        (wav(chirp(), channels=2), "2 channels of 16 bits"),
        (wav([]), "no sound"),
    ]:
        with pytest.raises(ev.BadSample, match=f"^b: .*{why}"):
            formats.read_wav(data, "b")


HEAD = "file,label,split,room"
ROWS = ["a/0.wav,yes,train,hall", "a/1.wav,no,train,hall", "b/2.wav,yes,test,lab", "b/3.wav,no,test,lab"]


def own_folder(folder: Path, rows=ROWS, head=HEAD, **files) -> Path:
    """A folder `words` of four recordings and its table."""
    root = folder / "words"
    for i, name in enumerate(("a/0.wav", "a/1.wav", "b/2.wav", "b/3.wav")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(wav(chirp(500 + i)))
    for name, data in files.items():
        (root / f"{name.replace('_', '/')}.wav").write_bytes(data)
    (root / "split.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder


def test_your_own_folder_is_a_data_set_by_its_name(tmp_path):
    made = catalog.prepare("words", tmp_path / "data", manual=own_folder(tmp_path))
    assert made.info.features["label"].names == ["no", "yes"] and made.info.metadata["rate"] == RATE
    train, test = (catalog.source("words", split, tmp_path / "data") for split in ("train", "test"))
    assert (len(train), len(test)) == (2, 2)
    for sample, n, label, room in ((train[0], 500, 1, b"hall"), (train[1], 501, 0, b"hall"), (test[1], 503, 0, b"lab")):
        assert sample["audio"].dtype == np.int16 and np.array_equal(sample["audio"], chirp(n))
        assert (sample["label"], sample["room"]) == (label, room)
    batch = next(iter(loader.load(test, loader.Sound(502), batch=2, shuffle=False, device=False)))
    assert batch["audio"].shape == (2, 502) and batch["audio"].dtype == np.int16
    np.testing.assert_array_equal(batch["audio"][1], chirp(503)[:502])
    assert (
        catalog.prepare("words", tmp_path / "data").info.full_name == "words/1.0.0"
    )  # prepared: the folder is not needed


FAULTS = {
    "no file": (dict(rows=[*ROWS, "b/9.wav,no,test,lab"]), r"split.csv, line 6: there is no file .*b/9.wav"),
    "no first file": (dict(rows=["z.wav,no,test,lab", *ROWS]), r"split.csv, line 2: there is no file .*z.wav"),
    "another rate": (
        dict(b_3=wav(chirp(), rate=16000)),
        r"line 5, .*b/3.wav: 16000 samples a second; the data set has 8000",
    ),
    "truncated": (dict(a_1=wav(chirp())[:-7]), r"line 3, .*a/1.wav: truncated"),
    "no wav": (dict(a_1=b"ID3 an mp3"), r"line 3, .*a/1.wav: no .wav file"),
    "a column is missing": (
        dict(head="file,class,split,room"),
        r"line 1: no column label; the first line has file, class",
    ),
    "a column twice": (dict(head="file,label,split,label"), r"line 1: a column must have .* own, .*; got 'label'"),
    "a column of the sound": (dict(head="file,label,split,audio"), r"line 1: a column must have .*; got 'audio'"),
    "a column without a name": (dict(head="file,label,split,"), r"line 1: a column must have .*; got ''"),
    "a field is missing": (dict(rows=[*ROWS, "b/2.wav,no"]), r"line 6: 2 fields; the first line has 4"),
    "no label": (dict(rows=[*ROWS, "b/5.wav,,train,lab"]), r"line 6: label is empty"),
    "a bad split": (dict(rows=[*ROWS, "b/5.wav,no,2 / 3,lab"]), r"line 6: split must be a word"),
    "in both splits": (dict(rows=[*ROWS, "a/0.wav,yes,test,hall"]), r"line 6: a/0.wav is there already, in line 2"),
    "outside": (dict(rows=["../x.wav,yes,train,hall"]), r"line 2: file must lie below"),
    "no rows": (dict(rows=[]), r"split.csv: no recordings"),
    "a quote": (dict(rows=[*ROWS, '"b/5.wav,no,test,lab']), r"line 6: unexpected end of data"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_file_and_line_and_leaves_nothing(tmp_path, fault):
    change, why = FAULTS[fault]
    with pytest.raises(ev.BadSample, match=why):
        catalog.prepare("words", tmp_path / "data", manual=own_folder(tmp_path, **change))
    assert not left_behind(tmp_path / "data")


def test_a_name_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(archives.Missing, match="words is not in the catalog .*, and there is no folder .*words: to"):
        catalog.prepare("words", tmp_path / "data", manual=tmp_path)
    (tmp_path / "words").mkdir()
    with pytest.raises(archives.Missing, match="words has neither a folder train nor split.csv: to prepare"):
        catalog.prepare("words", tmp_path / "data", manual=tmp_path)
    with pytest.raises(ValueError, match=r"or a folder of yours that is prepared; got 'word'"):
        catalog.source("word", "train", tmp_path / "data")
    with pytest.raises(archives.Missing, match="spoken_digits needs recordings in .*github.com/Jakobovski"):
        catalog.prepare("spoken_digits", tmp_path / "data", manual=tmp_path)


def test_spoken_digits_are_split_as_their_authors_say(tmp_path):
    folder = tmp_path / "spoken_digits" / "recordings"
    folder.mkdir(parents=True)
    for i, name in enumerate(("7_theo_4", "7_theo_5", "0_lucas_0", "0_lucas_49")):
        (folder / f"{name}.wav").write_bytes(wav(chirp(300 + i)))
    catalog.prepare("spoken_digits", tmp_path / "data", manual=tmp_path)
    found = {
        split: [
            (int(s["label"]), s["speaker"], len(s["audio"]))
            for s in catalog.source("spoken_digits", split, tmp_path / "data")
        ]
        for split in ("train", "test")
    }
    assert found == {"test": [(0, b"lucas", 302), (7, b"theo", 300)], "train": [(0, b"lucas", 303), (7, b"theo", 301)]}
    (folder / "seven.wav").write_bytes(wav(chirp()))
    with pytest.raises(ev.BadSample, match="seven.wav: the name is not DIGIT_SPEAKER_INDEX.wav"):
        catalog.prepare("spoken_digits", tmp_path / "again", manual=tmp_path)
    assert not left_behind(tmp_path / "again")


def test_the_command_lists_counts_and_draws_sound(tmp_path, capsys):
    from snnfuse.data.__main__ import main

    Image = pytest.importorskip("PIL.Image", reason="the command needs the extra `data`")
    own_folder(tmp_path, a_0=wav(chirp(2400)))
    common = ["--folder", str(tmp_path / "data")]
    assert main(["prepare", "words", "--manual", str(tmp_path), *common]) == 0
    assert main(["list", *common]) == 0
    assert f"words                prepared in {tmp_path}" in capsys.readouterr().out
    assert main(["info", "words", *common]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["samples_a_second"] == RATE and about["labels"] == ["no", "yes"]
    assert about["splits"]["train"]["seconds_per_sample"] == pytest.approx((2400 + 501) / 2 / RATE)
    assert main(["show", "words", "--out", str(tmp_path / "a.png"), *common]) == 0
    assert "words/train[0]: yes, 0.300 s at 8000 samples a second" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as image:
        picture = np.asarray(image).astype(int)
    steps = 1 + (2400 - 256) // 80
    assert picture.shape == (2 * 40 * 4 + 2, 4 * steps, 3)
    darkest = picture[: 40 * 4 : 4, ::4].sum(-1).argmin(0)  # of each step: the chirp rises, so the band moves up
    assert darkest[0] > darkest[steps // 2] > darkest[-1]
    colours = picture[40 * 4 + 2 :].reshape(-1, 3)
    assert (colours[:, 2] > colours[:, 0]).any() and (colours[:, 0] > colours[:, 2]).any()  # ON and OFF
    assert main(["prepare", "nothing", "--manual", str(tmp_path), *common]) == 1
    assert "error: nothing is not in the catalog" in capsys.readouterr().err


def test_a_table_in_another_code_is_named(tmp_path):
    (tmp_path / "split.csv").write_bytes("file,label,split\na.wav,né,train\n".encode("latin1"))
    with pytest.raises(ev.BadSample, match=r"split.csv: is no text in UTF-8"):
        read_table(tmp_path / "split.csv")
