"""Random values, types, shapes and options at every public function: the right value, or an error of ours that says why.

Each function has a case below: a function of hypothesis' `draw` that makes one call and compares it with NumPy in float64.
A call may instead raise an error, but only one that our own code raised (its last frame is in snnfuse) and whose message
says something about an argument. An IndexError, ZeroDivisionError or TypeError out of JAX, NumPy or Flax fails the test, and
so does a NaN from finite input.

Calls run eagerly (`jax.disable_jit`) on tiny shapes, so that next to nothing is compiled. `make fuzz` tries more:
SNNFUSE_FUZZ=1000 examples of each function.
"""

import io
import os
import traceback
import wave
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import snnfuse as sf
from snnfuse import data, nn, online, parallel, training
from snnfuse.data import (
    audio,
    augment,
    encoders,
    event_augment,
    events,
    formats,
    image_augment,
    loader,
    packed,
    signals,
)
from snnfuse.interop import snntorch

EXAMPLES = int(os.environ.get("SNNFUSE_FUZZ", 6))
HERE = str(Path(sf.__file__).parent)
CASES = {}


def case(*names):
    """Register a function of `draw` as the case of public names."""

    def register(f):
        CASES.update(dict.fromkeys(names, f))
        return f

    return register


class Refused(Exception):
    """The call raised an error as it should; there is no value to compare."""


def call(f, *args, must_work=False, **kwargs):
    """The result. Raises Refused after a sound error, AssertionError after any other."""
    try:
        return f(*args, **kwargs)
    except (ValueError, TypeError, NotImplementedError, OverflowError, FloatingPointError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        text = str(error)
        assert last.startswith(HERE), f"{type(error).__name__} from {last}: {text}"
        assert len(text) > 10 and not must_work, f"a sound call was refused: {text}"
        raise Refused from None


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    assert not np.isnan(got).any(), "a NaN from finite input"
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(1.0, np.abs(want).max(initial=0)))


def array(draw, shape, low=-3.0, high=3.0, dtype=np.float32):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.uniform(low, high, shape).astype(dtype)


def one_of(draw, *values):
    return draw(st.sampled_from(values))


WHOLE = (-3, -1, 0, 1, 2, 5, 1.5, 2.0, True, None, "2", np.int64(3), 2**40)  # for an argument that is a whole number
NUMBER = (-1.0, 0.0, 0.25, 1.0, 3, np.nan, np.inf, -np.inf, 1e30)

# ---- events


def recording(draw, sensor, sound=False):
    """Events that may break every rule, or none of them if `sound`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = one_of(draw, 0, 1, 2, 7, 40)
    out = 0 if sound else one_of(draw, 0, 0, 0, 1, 2**20)
    t = np.sort(rng.integers(0, one_of(draw, 1, 50, 10**6, 2**33), n))
    t = t if sound or draw(st.booleans()) else rng.permutation(t)
    made = {"t": t, "x": rng.integers(0, sensor.width + out, n), "y": rng.integers(-out, sensor.height, n)}
    made["p"] = rng.integers(0, 2, n) if draw(st.booleans()) else rng.choice([-1, 1], n)
    for column in made:
        dtype = one_of(draw, np.int64, np.int64, np.int32, np.float64, np.uint16)
        if sound and column == "t" or dtype == np.uint16 and (made[column].min(initial=0) < 0 or column == "t"):
            dtype = np.int64
        with np.errstate(all="ignore"):
            made[column] = made[column].astype(dtype)
    if not sound:
        spoil = one_of(draw, None, None, None, "nan", "lengths", "missing", "text", "rank", "half")
        column = one_of(draw, *made)
        if spoil == "nan" and n:
            made[column] = np.where(np.arange(n) == n // 2, np.nan, made[column])
        elif spoil == "half" and n:
            made[column] = made[column] + 0.5
        elif spoil == "lengths":
            made[column] = made[column][: n // 2]
        elif spoil == "missing":
            del made[column]
        elif spoil == "text":
            made[column] = made[column].astype(str)
        elif spoil == "rank":
            made[column] = made[column].reshape(-1, 1)
    return made


def a_sensor(draw):
    return events.Sensor(*one_of(draw, (4, 6), (1, 9, 1), (3, 3, 1), (1, 5, 2)))


def checked(draw):
    """(sensor, the options of the check, the recording as given, and in order as float64) or Refused."""
    sensor, how = a_sensor(draw), {"on_unsorted": one_of(draw, "raise", "sort", "sort", "drop")}
    given = recording(draw, sensor, sound=draw(st.booleans()))
    return sensor, how, given


def reference(given, sensor, how):
    """The recording in order, all columns there, polarity 0 and 1, from first principles."""
    n = len(given["t"])
    columns = {c: np.asarray(given.get(c, np.zeros(n)), np.float64).astype(np.int64) for c in "txyp"}
    order = np.argsort(columns["t"], kind="stable")
    columns = {c: v[order] for c, v in columns.items()}
    columns["p"] = (columns["p"] > 0).astype(np.int64) if sensor.polarities > 1 else np.zeros(n, np.int64)
    columns["y"] = columns["y"] if sensor.height > 1 else np.zeros(n, np.int64)
    return columns


def loop_frames(columns, bins, T, sensor):
    frames = np.zeros((T, *sensor))
    for k, x, y, p in zip(bins, columns["x"], columns["y"], columns["p"], strict=True):
        if 0 <= k < T:
            frames[k, y, x, p] += 1
    return frames


def bins_of(t, T, split, dt):
    t = [int(v) for v in t]
    n, since = len(t), [v - t[0] for v in t]
    if split == "dt":
        return [s // dt for s in since]
    position, width = (range(n), n // T) if split == "number" else (since, since[-1] // T if n else 0)
    return [min(p // width, T - 1) if width else T - 1 for p in position]


@case("data.events.check")
def _(draw):
    sensor, how, given = checked(draw)
    got = call(events.check, given, sensor, **how)
    want = reference(given, sensor, how)
    for column in set(sensor.columns) & set(got):
        close(got[column], want[column])


@case("data.events.to_frames", "data.events.check_split")
def _(draw):
    sensor, how, given = checked(draw)
    T, split, dt = (
        one_of(draw, *WHOLE),
        one_of(draw, "number", "time", "dt", "none"),
        one_of(draw, None, 1, 7, 10**5, 0, 2.5),
    )
    if T == 2**40 or split == "dt" and (dt == 1 or dt == 7) and T is None:
        T = 3  # frames that no memory holds
    got = call(events.to_frames, given, sensor, T, split=split, dt=dt, **how)
    want = reference(given, sensor, how)
    T = len(got) if T is None else int(T)
    bins = bins_of(want["t"], T, split, dt)
    if split == "dt" and len(bins) and len(got) > max(bins):
        assert got.sum() == len(bins)
    close(got, loop_frames(want, bins, T, sensor))


@case("data.events.count_events", "data.events.addresses")
def _(draw):
    sensor, _, given = checked(draw)
    T, place = one_of(draw, 1, 3), None
    bins = array(draw, len(given.get("t", ())), -1, T + 1).astype(one_of(draw, np.int64, np.int8, np.float32))
    place = call(events.addresses, given, sensor)
    got = call(events.count_events, given, bins, T, sensor)
    columns = {c: np.asarray(given.get(c, np.zeros(len(bins))), np.float64).astype(np.int64) for c in "txyp"}
    columns["p"] = (columns["p"] > 0).astype(int) * (sensor.polarities > 1)
    columns["y"] = columns["y"] * (sensor.height > 1)
    close(got, loop_frames(columns, bins, T, sensor))
    close(place, (columns["y"] * sensor.width + columns["x"]) * sensor.polarities + columns["p"])


@case("data.events.split_by_number", "data.events.split_by_time", "data.events.split_by_dt")
def _(draw):
    t, T = recording(draw, events.Sensor(4, 4), sound=draw(st.booleans())).get("t", np.zeros(3)), one_of(draw, *WHOLE)
    number = call(events.split_by_number, t, T)
    close(number, bins_of(t, int(T), "number", None))
    close(call(events.split_by_time, t, T), bins_of(t, int(T), "time", None))
    close(call(events.split_by_dt, t, T, 5), bins_of(t, 5, "dt", int(T)))


@case("data.events.to_uint8")
def _(draw):
    counts = array(draw, (2, 3), 0, one_of(draw, 5, 300, 2**40)).astype(one_of(draw, np.int64, np.float32))
    saturate = draw(st.booleans())
    close(call(events.to_uint8, counts, saturate=saturate), np.minimum(np.trunc(counts), 255))


@case("data.events.at_least")
def _(draw):
    value = one_of(draw, *WHOLE)
    assert call(events.at_least, "T", value, 1) == value >= 1 or value == 1


@case("data.events.voxel_grid")
def _(draw):
    sensor, how, given = checked(draw)
    T = one_of(draw, *WHOLE[:-1])
    got = call(events.voxel_grid, given, sensor, T, **how)
    want, T = reference(given, sensor, how), int(T)
    grid = np.zeros((T, sensor.height, sensor.width, 1))
    if len(t := want["t"]):
        s = (T - 1) * ((t - t[0]) / max(t[-1] - t[0], 1))
        sign = np.where(want["p"], 1, -1) if sensor.polarities > 1 else np.ones(len(t))
        for k in range(T):
            np.add.at(grid[k, ..., 0], (want["y"], want["x"]), sign * np.maximum(0, 1 - np.abs(k - s)))
    close(got, grid)


@case("data.events.time_surface")
def _(draw):
    sensor, how, given = checked(draw)
    T, dt, tau = one_of(draw, *WHOLE[:-1]), one_of(draw, 1, 1000, 0, 10**6), one_of(draw, *NUMBER, 1e4)
    got = call(events.time_surface, given, sensor, T, dt, tau, **how)
    want = reference(given, sensor, how)
    surface = np.zeros((int(T), *sensor))
    for k in range(int(T)):
        for t, x, y, p in zip(*(want[c] for c in "txyp"), strict=True):
            if (t - want["t"][0]) // dt <= k:
                surface[k, y, x, p] = np.exp(-((k + 1) * dt - (t - want["t"][0])) / tau)
    close(got, surface)


# ---- changes of recordings


def kept_together(got, given):
    """No event was invented: every one that is left has the polarity of one that was given."""
    lengths = {len(v) for v in got.values()}
    assert len(lengths) == 1 and lengths.pop() <= len(given["t"])
    assert np.all(np.diff(np.asarray(got["t"], np.int64)) >= 0)


@case("data.augment.flip", "data.augment.shift", "data.augment.crop", "data.augment.keep")
def _(draw):
    sensor = a_sensor(draw)
    given = recording(draw, sensor, sound=draw(st.booleans()))
    flipped = call(augment.flip, given, sensor)
    close(flipped["x"], sensor.width - 1 - np.asarray(given["x"], np.float64))
    dx, dy = one_of(draw, -2, 0, 3, 100), one_of(draw, -1, 0, 2)
    moved = call(augment.shift, given, sensor, dx, dy)
    x, y = np.asarray(given["x"], np.int64) + dx, np.asarray(given.get("y", given["x"] * 0), np.int64)
    y = y + dy if sensor.height > 1 else y * 0
    inside = (x >= 0) & (x < sensor.width) & (y >= 0) & (y < sensor.height)
    close(moved["x"], x[inside])
    kept_together(moved, given)
    kept_together(call(augment.crop, given, 2, 2, 0, 1), given)
    close(augment.keep(given, inside)["t"], np.asarray(given["t"])[inside])


@case("data.augment.jitter", "data.augment.drop")
def _(draw):
    given, rng = recording(draw, events.Sensor(4, 6), sound=draw(st.booleans())), np.random.default_rng(0)
    kept_together(call(augment.jitter, given, rng, one_of(draw, *NUMBER)), given)
    rate = one_of(draw, *NUMBER)
    left = call(augment.drop, given, rng, rate)
    kept_together(left, given)
    assert len(left["t"]) >= min(1, len(given["t"])) and (rate > 0 or len(left["t"]) == len(given["t"]))


@case("data.augment.Augment", "data.augment.without")
def _(draw):
    choices = dict(flip=one_of(draw, *NUMBER), shift=one_of(draw, 0, 2, -1, 50), drop=one_of(draw, *NUMBER))
    choices |= dict(jitter=one_of(draw, *NUMBER), crop=one_of(draw, None, (2, 3), (9, 9), (0, 1), (2,)))
    sound = {k: v for k, v in choices.items() if draw(st.booleans())}
    change, sensor = call(augment.Augment, **sound), a_sensor(draw)
    given = recording(draw, sensor, sound=draw(st.booleans()))
    got = call(change, given, sensor, np.random.default_rng(0))
    kept_together(got, given)
    call(events.to_frames, got, change.sensor(sensor), 2, must_work=True)
    assert augment.without(change).crop == change.crop


# ---- packed


@case("data.packed.pack_bits", "data.packed.unpack_bits")
def _(draw):
    spikes = array(draw, (2, 3, 3), -0.5, 1.5).round().astype(one_of(draw, np.int64, np.float32, bool))
    bits = packed.pack_bits(spikes)
    shape = one_of(draw, (3, 3), (9,), (4, 4), (3, 2))
    got = call(packed.unpack_bits, jnp.asarray(bits), shape, dtype=one_of(draw, jnp.float32, jnp.bool_))
    close(got.reshape(2, -1)[:, :9], (spikes != 0).reshape(2, -1)[:, : got[0].size])


@case("data.packed.pack_events", "data.packed.bin_events")
def _(draw):
    sensor, how, given = checked(draw)
    size, T = one_of(draw, 40, 40, 3, -1), one_of(draw, 1, 3, 0)
    split, dt = one_of(draw, "number", "time", "dt", "none"), one_of(draw, None, 1000, 2**40)
    made = call(packed.pack_events, given, sensor, size, **how)
    got = call(packed.bin_events, jnp.asarray(made), sensor, T, split=split, dt=dt)
    close(got, call(events.to_frames, given, sensor, T, split=split, dt=dt, must_work=True, **how))


@case("data.formats")
def _(draw):
    """Readers of files: random bytes after a right beginning."""
    junk = bytes(array(draw, one_of(draw, 0, 1, 8, 64, 200), 0, 255).astype(np.uint8))
    head = one_of(draw, b"", b"#!AER-DAT2.0\r\n", b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n")
    tonic = (formats.read_nmnist,) if find_spec("tonic") else ()
    for read in (formats.read_aedat2, formats.read_aedat3, *tonic):
        try:
            got = call(read, head + junk, "file")
        except Refused:
            continue
        assert len({len(column) for column in got.values()}) == 1
    text = "class,startTime_usec,endTime_usec\n" + one_of(
        draw, "", "1,2", "1,2,3,4", "a,b,c", "1,2,3", "nan,1,2", "-1,1,2"
    )
    assert all(0 <= trial.label < 11 for trial in call(formats.read_trials, text, "labels"))


# ---- encoders

DTYPES = (jnp.float32, jnp.bool_, jnp.uint8, jnp.int8, jnp.bfloat16)


def images(draw):
    top = one_of(draw, 1.0, 1.0, 1.0, 1.5, np.nan)
    made = array(draw, (2, 3), 0, 1)
    made[0, 0] = top
    return np.nan_to_num(made).astype(np.int32) if draw(st.integers(0, 4)) == 4 else made


@case("data.encoders.bernoulli", "data.encoders.poisson", "data.encoders.paper", "data.encoders.direct")
def _(draw):
    x, T, dtype, key = images(draw), one_of(draw, 1, 4, 0, -1), one_of(draw, *DTYPES), jax.random.key(0)
    close(call(encoders.direct, x, T, jnp.float32), np.broadcast_to(x, (T, 2, 3)))
    spikes = call(encoders.bernoulli, key, x, T, dtype)
    rand = np.asarray(jax.random.uniform(key, (T, 2, 3)))
    close(spikes, x > rand)
    close(call(encoders.paper, x, rand, dtype), x > rand)
    counts = np.asarray(call(encoders.poisson, key, x, T, one_of(draw, *NUMBER), dtype), np.float64)
    assert counts.shape == (T, 2, 3) and counts.min() >= 0


@case("data.encoders.latency", "data.encoders.population")
def _(draw):
    x, T, dtype = images(draw), one_of(draw, 1, 4, 0), one_of(draw, *DTYPES)
    curve, silent = one_of(draw, "linear", "log", "cubic"), one_of(draw, -1.0, 0.0, 0.3)
    got = np.asarray(call(encoders.latency, x, T, curve=curve, silent_to=silent, dtype=dtype), np.float64)
    with np.errstate(divide="ignore"):
        linear = (T - 1) * (1 - x.astype(np.float64))
        at = linear if curve == "linear" else (T - 1) - np.log1p(np.expm1(T - 1) * x)
    sure = np.abs(at - np.floor(at) - 0.5) > 1e-3
    want = (np.round(at) == np.arange(T).reshape(T, 1, 1)) & (x > silent)
    close(got[:, sure], want[:, sure])
    neurons = one_of(draw, 3, 5, 2)
    close(call(encoders.population, x, T, neurons, dtype=dtype).shape, (T, 2, 3, neurons))


@case("data.encoders.phase", "data.encoders.phase_weights")
def _(draw):
    x, bits = images(draw), one_of(draw, 1, 3, 8, 0, 30)
    got = call(encoders.phase, x, bits, bits)
    weights = call(encoders.phase_weights, bits, bits)
    close(
        (np.asarray(got) * np.asarray(weights).reshape(-1, 1, 1)).sum(0),
        np.minimum(np.floor(x * 2.0**bits), 2**bits - 1) / 2**bits,
    )


@case("data.encoders.delta")
def _(draw):
    xs, threshold = array(draw, (one_of(draw, 1, 4, 0), 3)), one_of(draw, 0.5, *NUMBER)
    got = call(encoders.delta, xs, threshold, two_sided=draw(st.booleans()))
    step = np.diff(xs, axis=0, prepend=xs[:1])
    close(got, np.stack([step >= threshold, -step >= threshold], -1) if got.ndim == 3 else step >= threshold)


# ---- augmentations of images


@case(*(f"data.image_augment.{name}" for name in ("crop", "cutmix", "cutout", "flip", "mixup", "move", "rand_augment")))
def _(draw):
    x = array(draw, one_of(draw, (2, 3, 4, 3), (1, 5, 5, 1), (3, 3, 1)), 0, 1, one_of(draw, np.float32, np.uint8))
    key, number = jax.random.key(draw(st.integers(0, 99))), one_of(draw, *WHOLE, *NUMBER)
    targets = jnp.eye(one_of(draw, 2, 3, 1))[: len(x)]
    name = one_of(draw, "crop", "cutmix", "cutout", "flip", "mixup", "move", "rand_augment")
    f = getattr(image_augment, name)
    if name in ("mixup", "cutmix"):
        got, mixed = call(f, key, x, targets, number)
        close(mixed.sum(-1), np.ones(len(x)))
    elif name == "move":
        got = call(f, key, x, scale=number, turn=one_of(draw, 30.0, *NUMBER), fill=one_of(draw, 0.5, *NUMBER))
    else:
        got = call(f, key, x, one_of(draw, 1, 2) if name == "rand_augment" else number, *draw_more(draw, name, number))
    assert got.shape == x.shape and got.dtype == x.dtype
    assert 0 <= got.min() and got.max() <= 1  # NaN fails here too


def draw_more(draw, name, number):
    more = dict(crop=("constant", "reflect", "edge"), cutout=(0.0, 0.5), flip=(), rand_augment=(number,))[name]
    return (one_of(draw, *more),) if more else ()


@case("data.encoders.level_crossing")
def _(draw):
    xs, step = array(draw, (one_of(draw, 1, 4, 0), 3)), one_of(draw, 0.5, *NUMBER)
    got = call(encoders.level_crossing, xs, step, two_sided=draw(st.booleans()))
    if 0.01 < step < 1e3:
        level = np.float64(xs[0])
        for t, x in enumerate(xs):
            up, down = (np.maximum(0, np.floor(d / step)) for d in (x - level, level - x))
            close(got[t], np.stack([up, down], -1) if got.ndim == 3 else up)
            level = level + step * (up - down)


@case("data.encoders.lif")
def _(draw):
    xs, threshold = array(draw, (one_of(draw, 1, 4, 0), 3)), one_of(draw, 0.5, *NUMBER)
    decay = one_of(draw, 0.5, *NUMBER)
    got, v = call(encoders.lif, xs, decay, threshold), np.zeros(3, np.float32)
    for x, s in zip(xs, got, strict=True):
        u = np.float32(decay) * v + x
        close(s, u >= np.float32(threshold))
        v = u - np.float32(threshold) * s


# ---- audio


def sounds(draw):
    shape = one_of(draw, (2, 64), (2, 64), (64,), (0, 64), (2, 0), (1, 2, 40), ())
    if one_of(draw, True, False):
        return array(draw, shape, -1, 1, one_of(draw, np.float32, np.float32, np.float16))
    return array(draw, shape, -3e4, 3e4, one_of(draw, np.int16, np.int16, np.int32, np.bool_))


@case(
    *("data.audio." + name for name in ("mel_filters", "log_mel", "loudness", "centre", "samples", "steps")),
)
def _(draw):
    sound, rate = sounds(draw), one_of(draw, 8000, 8000, *NUMBER)
    window, hop, bands = one_of(draw, 32, 32, *WHOLE), one_of(draw, 10, *WHOLE), one_of(draw, 4, 4, *WHOLE[:-1])
    options = dict(
        window=window, hop=hop, bands=bands, low=one_of(draw, 100.0, *NUMBER), high=one_of(draw, None, *NUMBER)
    )
    got = call(audio.log_mel, sound, rate, **options, floor=one_of(draw, 1e-6, *NUMBER))
    assert got.shape == (1 + (sound.shape[-1] - window) // hop, *sound.shape[:-1], bands) and jnp.isfinite(got).all()
    assert call(audio.steps, sound.shape[-1], window, hop) == len(got)
    level = np.asarray(call(audio.loudness, got, one_of(draw, 7.0, *NUMBER)))
    assert level.shape == got.shape and ((level >= 0) & (level <= 1)).all()
    centred = call(audio.centre, level, one_of(draw, 0.5, *NUMBER))
    assert centred.shape == level.shape and (jnp.abs(centred) <= 1).all()


@case("data.audio.shift", "data.audio.speed", "data.audio.noise")
def _(draw):
    sound, key = sounds(draw), jax.random.key(0)
    moved = call(audio.shift, key, sound, one_of(draw, 0, *WHOLE[:-1]))
    assert moved.shape == sound.shape and moved.dtype == sound.dtype
    faster = call(audio.speed, key, sound, one_of(draw, 0.1, *NUMBER))
    louder = call(audio.noise, key, sound, one_of(draw, 10.0, *NUMBER), one_of(draw, 20.0, *NUMBER))
    for made in (faster, louder):
        assert made.shape == sound.shape and jnp.isfinite(made).all()


@case("data.audio.stretch", "data.audio.mask")
def _(draw):
    bands, key = array(draw, one_of(draw, (4, 2, 3), (4, 2, 3), (1, 1, 1), (0, 2, 3), (4, 3), ())), jax.random.key(0)
    made = call(audio.stretch, key, bands, one_of(draw, 0.1, *NUMBER), one_of(draw, 0.0, *NUMBER))
    assert made.shape == bands.shape and jnp.isfinite(made).all()
    assert (jnp.abs(made) <= np.abs(bands).max() + 1e-5).all()
    made = call(audio.mask, key, bands, *(one_of(draw, 2, *WHOLE) for _ in range(2)), one_of(draw, 1, *WHOLE[:-1]))
    assert ((made == 0) | (made == bands)).all()


@case("data.audio.fit", "data.audio.envelope", "data.audio.warp", "data.audio.mixup")
def _(draw):
    bands, key = array(draw, one_of(draw, (4, 2, 3), (1, 1, 1), (0, 2, 3), (4, 3), ()), 0, 1), jax.random.key(0)
    name = one_of(draw, "fit", "envelope", "warp", "mixup")
    if name == "fit":
        made = call(audio.fit, bands, steps := one_of(draw, 3, *WHOLE[:-1]), one_of(draw, 0.3, *NUMBER))
        assert made.shape == (steps, *bands.shape[1:]) and (made >= 0).all() and (made <= 1).all()
    elif name == "envelope":
        count = one_of(draw, 2, *WHOLE)
        made = call(audio.envelope, bands, count)
        C = np.cos(np.pi * np.arange(count)[:, None] * (np.arange(bands.shape[-1]) + 0.5) / bands.shape[-1])
        close(made, bands @ (C.T / np.square(C).sum(1) @ C))
    elif name == "warp":
        made = call(audio.warp, key, bands, one_of(draw, 0.1, *NUMBER), one_of(draw, 8000, *NUMBER))
        assert made.shape == bands.shape and (made >= 0).all() and (made <= 1).all()
    else:
        targets = jnp.eye(2)[: one_of(draw, 0, 1, 2)]
        sound, mixed = call(audio.mixup, key, sounds(draw), targets, one_of(draw, 0.3, *NUMBER))
        assert jnp.isfinite(sound).all()
        close(mixed.sum(-1), np.ones(len(targets)))


@case(*(f"data.signals.{name}" for name in ("windows", "log_rms", "piece", "gain", "noise")), "data.examples.Signals")
def _(draw):
    xs, key = array(draw, one_of(draw, (2, 5, 3), (2, 5, 3), (1, 1, 1), (2, 0, 3), (5, 3), ())), jax.random.key(0)
    width, hop, number = one_of(draw, 2, *WHOLE), one_of(draw, 1, *WHOLE), one_of(draw, 0.1, *NUMBER)
    name = one_of(draw, "windows", "piece", "gain", "noise", "Signals")
    if name == "windows":
        made = call(signals.windows, xs, width, hop)
        want = np.stack([xs[:, i : i + width] for i in range(0, xs.shape[1] - width + 1, hop)])
        close(made, want)
        close(call(signals.log_rms, xs, width, hop, number), np.log(number + np.sqrt(np.square(want).mean(2))))
    elif name == "piece":
        made = np.asarray(call(signals.piece, key, xs, width, random=draw(st.booleans())))
        assert made.shape == (len(xs), width, xs.shape[2]) and np.isin(made, xs).all()
    elif name == "Signals":
        made = call(loader.Signals, width)
        if xs.ndim == 3 and width < 100:
            close(made({"signal": xs[0], "label": 1}, None)["signal"], np.pad(xs[0], ((0, 9), (0, 0)))[: int(width)])
    else:
        made = call(getattr(signals, name), key, xs, number)
        assert made.shape == xs.shape and (number > 1e9 or jnp.isfinite(made).all())


@case(*(f"data.event_augment.{name}" for name in ("move", "drop", "resize", "piece")))
def _(draw):
    sensor, how, given = checked(draw)
    made = call(packed.pack_events, given, sensor, one_of(draw, 5, 40), **how)[None]
    key, name = jax.random.key(0), one_of(draw, "move", "drop", "resize", "piece")
    number, options = one_of(draw, 0.25, *NUMBER), one_of(draw, "shift", "flip", "scale", "turn")
    size = one_of(draw, 2, *WHOLE[:-1]), one_of(draw, 3, *WHOLE[:-1])
    if name == "move":
        got, space = call(event_augment.move, key, made, sensor, **{options: number}), sensor
    elif name == "drop":
        got, space = call(event_augment.drop, key, made, number), sensor
    elif name == "resize":
        got = call(event_augment.resize, made, sensor, *size)
        space = sensor._replace(height=int(size[0]), width=int(size[1]))
        assert ((got[..., 1] == packed.PADDING) == (made[..., 1] == packed.PADDING)).all()
    else:
        got, space = call(event_augment.piece, key, made, one_of(draw, 100, *WHOLE[:-1]), number), sensor
    address = np.asarray(got)[..., 1]
    assert got.shape == made.shape and (address[address != packed.PADDING] < np.prod(space)).all()


@case("data.examples.Sound")
def _(draw):
    out, samples = io.BytesIO(), array(draw, one_of(draw, 0, 1, 30), -3e4, 3e4, np.int16)
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, one_of(draw, 1, 8000, 96_000), 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    data = out.getvalue()[: one_of(draw, None, None, None, 0, 10, 44, 60)]
    read, _ = call(formats.read_wav, data, "a file")
    close(read, samples)
    size = one_of(draw, 10, 40, *WHOLE[:-1])
    got = call(loader.Sound, size)({"audio": read, "label": 1}, None)["audio"]
    close(got, np.pad(samples, (0, 100))[: int(size)])


# ---- the loader


@case(
    "data.loader.load",
    "data.examples.Frames",
    "data.examples.PackedFrames",
    "data.examples.Images",
    "data.loader.Batches",
    "data.loader.Position",
    "data.loader.read",
)
def _(draw):
    pytest.importorskip("grain", reason="the loader needs the extra `data`")
    sensor = events.Sensor(4, 6)
    source = [{"events": recording(draw, sensor, sound=True), "label": k} for k in range(one_of(draw, 0, 3))]
    T, split, dt = one_of(draw, 0, 2, None), one_of(draw, "number", "time", "dt", "x"), one_of(draw, None, 0, 2**31)
    frames = call(loader.Frames, sensor, T, split=split, dt=dt, store=one_of(draw, "bits", "bytes", "b"))
    assert call(loader.read, source, [0])[0]["label"] == 0 if source else True
    device = call(loader.PackedFrames, sensor, T, 40, split=split, dt=dt)
    options = dict(batch=one_of(draw, 1, 2, 0, -1, 9), epochs=one_of(draw, 1, 0, -1), seed=one_of(draw, 0, -1))
    for example in (frames, device):
        batches = call(loader.load, source, example, shuffle=False, device=False, **options)
        batch = next(iter(batches))
        want = [call(events.to_frames, s["events"], sensor, T, split=split, dt=dt) for s in source[: options["batch"]]]
        want = np.stack(want, 1)
        close(
            example.unpack(jnp.asarray(batch["frames"])), want > 0 if getattr(example, "store", "") == "bits" else want
        )


@case("data.loader.pieces")
def _(draw):
    source = [{"xs": np.ones((n, 2)), "label": n} for n in one_of(draw, (), (3,), (3, 1, 5), (0, 2))]
    options = dict(
        batch=one_of(draw, 1, 2, *WHOLE), length=one_of(draw, 2, 9, *WHOLE), along=one_of(draw, ("xs",), ("ys",), ())
    )
    for batch in call(lambda **options: list(loader.pieces(source, lambda s, rng: s, **options)), **options):
        assert batch["xs"].shape == (options["length"], options["batch"], 2) and (batch["length"] >= 1).all()
        close(batch["xs"].sum((0, 2)), 2 * batch["length"])


# ---- neurons

SHAPE = (6, 2, 3)


def reset64(kind, u, s, threshold):
    if isinstance(kind, sf.NoReset):
        return u
    return u - s * threshold if isinstance(kind, sf.SoftReset) else (1 - s) * u + s * kind.v_reset


def run64(step, xs, *state):
    """Outputs and how far every membrane stays from its threshold, in float64."""
    outs, margins = [], []
    for x in np.asarray(xs, np.float64):
        *state, out, margin = step(x, *state)
        outs.append(out), margins.append(margin)
    return np.stack(outs), np.stack(margins)


def agree(layer, xs, step, *state, dtype=np.float32):
    """The layer's outputs are float64's in every lane whose membrane never comes near its threshold."""
    outs, final = call(layer, jnp.asarray(xs))
    want, margins = run64(step, xs, *(np.full(xs.shape[1:], float(s)) for s in state))
    sure = (np.abs(margins) > 1e-3 * np.maximum(1, np.abs(want).max(initial=0))).all(0)
    assert outs.dtype == xs.dtype and all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(final))
    close(np.asarray(outs, np.float64)[:, sure], want[:, sure], 1e-2 if xs.dtype != np.float32 else 1e-4)


def currents(draw):
    shape = one_of(draw, SHAPE, SHAPE, SHAPE, (4,), (0, 2, 3), (3, 0))
    return jnp.asarray(array(draw, shape), one_of(draw, jnp.float32, jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_))


def choices(draw, *names):
    """Some options of a neuron, in and out of their ranges."""
    known = dict(
        tau=(1.5, 4.0, 1.0, -1.0, np.nan),
        decay=(0.0, 0.5, 1.0, 1.5, -0.1, np.nan),
        threshold=(1.0, 0.5, np.nan),
        decay_input=(False, True),
        v_rest=(0.0, 0.25),
        reset=(sf.HardReset(), sf.HardReset(-0.5), sf.SoftReset(), sf.NoReset(), "soft", sf.SoftReset),
        learn=((), "threshold", "tua"),
        implementation=("scan", None, "cuda"),
    )
    return {n: one_of(draw, *known[n]) for n in names if draw(st.booleans())}


LEAKY = ("tau", "decay", "threshold", "decay_input", "v_rest", "reset", "learn", "implementation")


def decay_of(options):
    return options["decay"] if "decay" in options else 1 - 1 / options["tau"]


@case("nn.LIF", "nn.IF", "nn.ParametricLIF", "nn.Spiking", "LIF", "IF", "unroll")
def _(draw):
    xs, options = currents(draw), choices(draw, *LEAKY)
    kind = one_of(draw, nn.LIF, nn.IF, nn.ParametricLIF)
    allowed = {nn.IF: ("threshold", "reset"), nn.ParametricLIF: ("tau", "threshold", "decay_input", "reset", "v_rest")}
    options = {k: v for k, v in options.items() if k in allowed.get(kind, LEAKY)}
    layer = call(kind, **options)
    default = {nn.IF: 1.0, nn.ParametricLIF: 0.5}
    decay = decay_of(options) if {"tau", "decay"} & options.keys() else default[kind]
    gain = 1 - decay if options.get("decay_input", kind is nn.ParametricLIF) else 1
    rest, threshold, reset = (
        options.get("v_rest", 0.0),
        options.get("threshold", 1.0),
        options.get("reset", sf.HardReset()),
    )

    def step(x, v):
        u = rest + decay * (v - rest) + gain * x
        s = (u >= threshold) * 1.0
        return reset64(reset, u, s, threshold), s, u - threshold

    agree(layer, xs, step, rest)


@case("nn.LI", "LI")
def _(draw):
    xs, options = currents(draw), choices(draw, "tau", "decay", "decay_input", "v_rest", "implementation")
    layer = call(nn.LI, **options)
    decay, rest = decay_of(options), options.get("v_rest", 0.0)
    gain = 1 - decay if options.get("decay_input") else 1

    def step(x, v):
        v = rest + decay * (v - rest) + gain * x
        return v, v, np.full_like(v, np.inf)

    agree(layer, xs, step, rest)


@case("nn.CubaLIF", "CubaLIF")
def _(draw):
    xs, options, syn = currents(draw), choices(draw, *LEAKY), one_of(draw, 0.0, 0.5, 1.0, 1.5, np.nan)
    layer = call(nn.CubaLIF, decay_syn=syn, **options)
    decay, rest, threshold = decay_of(options), options.get("v_rest", 0.0), options.get("threshold", 1.0)
    gain, reset = 1 - decay if options.get("decay_input") else 1, options.get("reset", sf.HardReset())

    def step(x, i, v):
        i = syn * i + x
        u = rest + decay * (v - rest) + gain * i
        s = (u >= threshold) * 1.0
        return i, reset64(reset, u, s, threshold), s, u - threshold

    agree(layer, xs, step, 0, rest)


@case("nn.AdaptiveLIF", "AdaptiveLIF")
def _(draw):
    xs, options, adapt = currents(draw), choices(draw, *LEAKY), one_of(draw, 0.0, 0.5, 1.0, 1.5, np.nan)
    layer = call(nn.AdaptiveLIF, decay_adapt=adapt, **options)
    decay, rest, threshold = decay_of(options), options.get("v_rest", 0.0), options.get("threshold", 1.0)
    gain, reset = 1 - decay if options.get("decay_input") else 1, options.get("reset", sf.HardReset())

    def step(x, v, a):
        A, u = threshold + 0.2 * a, rest + decay * (v - rest) + gain * x
        s = (u >= A) * 1.0
        return reset64(reset, u, s, A), adapt * a + s, s, u - A

    agree(layer, xs, step, rest, 0)


@case("nn.ExpIF", "ExpIF")
def _(draw):
    xs, options, delta = currents(draw), choices(draw, *LEAKY), one_of(draw, 0.5, 1.0, 0.0, -1.0, np.inf)
    options.pop("decay_input", None)
    layer = call(nn.ExpIF, delta=delta, **options)
    decay, rest, threshold = decay_of(options), options.get("v_rest", 0.0), options.get("threshold", 1.0)
    reset = options.get("reset", sf.HardReset(-0.1))
    if isinstance(reset, sf.NoReset | sf.SoftReset):
        return  # without a hard reset v grows like e^v, past what a float holds

    def step(x, v):
        u = rest + decay * (v - rest) + (1 - decay) * (delta * np.exp((v - 0.8) / delta) + x)
        s = (u >= threshold) * 1.0
        return reset64(reset, u, s, threshold), s, u - threshold

    agree(layer, xs, step, rest)


@case("nn.Izhikevich", "Izhikevich")
def _(draw):
    xs, options = currents(draw), choices(draw, "learn", "implementation")
    layer = call(nn.Izhikevich, **options)

    def step(x, v, w):
        u, r = v + 0.5 * (0.04 * v * v + 5 * v + 140 - w + x), w + 0.5 * 0.02 * (0.2 * v - w)
        s = (u >= 30) * 1.0
        return (1 - s) * u + s * -65, r + 8 * s, s, u - 30

    agree(layer, xs, step, -65, -13)


@case("unroll_recurrent", "nn.Recurrent")
def _(draw):
    xs, decay = currents(draw), one_of(draw, 0.0, 0.5)
    heads, features = one_of(draw, 1, 3, 0, 2), one_of(draw, 3, 3, 4, 0)
    layer = call(nn.Recurrent, nn.LIF(decay=decay), features, heads=heads, rngs=nnx.Rngs(0))
    w = np.asarray(layer.weight[...], np.float64)
    w = w if heads == 1 else np.diag(w.ravel())

    def step(x, v, z):
        u = decay * v + x + z @ w
        s = (u >= 1) * 1.0
        return (1 - s) * u, s, s, u - 1

    agree(layer, xs, step, 0, 0)


@case("nn.Feedback")
def _(draw):
    xs, decay, width = currents(draw), one_of(draw, 0.0, 0.5), one_of(draw, 3, 3, 4)
    linear = nnx.Linear(3, width, rngs=nnx.Rngs(0))
    layer = call(nn.Feedback, nn.LIF(decay=decay, implementation=one_of(draw, None, "scan", "pallas")), linear)
    w = np.asarray(linear.kernel[...], np.float64)

    def step(x, v, z):
        u = decay * v + x + z @ w
        s = (u >= 1) * 1.0
        return (1 - s) * u, s, s, u - 1

    agree(layer, xs, step, 0, 0)


@case("interop.snntorch.Leaky", "interop.snntorch.Synaptic")
def _(draw):
    xs, decay, late = currents(draw), one_of(draw, 0.0, 0.5, 1.0), draw(st.booleans())
    layer = nn.Spiking(snntorch.Leaky(late), sf.LIFParams(decay))

    def step(x, v):
        reset, u = (v >= 1) * 1.0, decay * v + x
        u = u - reset
        s = (u >= 1) * 1.0
        return (u if late else u - (s - reset)), s, np.minimum(np.abs(u - 1), np.abs(v - 1))

    if late:
        agree(layer, xs, step, 0)
    else:
        call(layer, xs)


SURROGATES = (
    sf.ATan,
    sf.Sigmoid,
    sf.FastSigmoid,
    sf.Gaussian,
    sf.MultiGaussian,
    sf.Rectangle,
    sf.Triangle,
    sf.LeakyReLU,
    sf.PiecewiseQuadratic,
)


@case("spike", "Relaxed", *(s.__name__ for s in SURROGATES))
def _(draw):
    """The derivative of a relaxed spike is its surrogate, and the spike's own is 0 or 1."""
    make, width = one_of(draw, *SURROGATES), one_of(draw, None, 0.5, 3.0)
    surrogate = make() if width is None else make(width)
    u = array(draw, (5,), -2, 2)
    close(call(sf.spike, u, surrogate), u >= 0)
    d = jax.vmap(jax.grad(lambda u: sf.spike(u, surrogate)))(u)
    close(d, surrogate(jnp.asarray(u)))
    with jax.enable_x64(True):
        wide, h = jnp.asarray(u, jnp.float64), 1e-6
        slope = (sf.spike(wide + h, sf.Relaxed(surrogate)) - sf.spike(wide - h, sf.Relaxed(surrogate))) / (2 * h)
        away = np.abs(slope - np.asarray(surrogate(wide))) < 1e-3
    assert away.sum() >= 4, (surrogate, u, slope)  # a kink may lie between the two points


@case("pack", "unpack", "Packed", "nn.Spikes", "nn.PackSpikes")
def _(draw):
    T, steps = one_of(draw, 1, 8, 9), one_of(draw, 8, 16, 32, 7, 0)
    spikes = (array(draw, (T, 2, 3)) > 0).astype(one_of(draw, np.float32, bool, np.int8))
    words = call(sf.pack, jnp.asarray(spikes), steps)
    steps = one_of(draw, T, T + 1, T - 1, 100, 0)
    got = call(sf.unpack, words, steps)
    close(got, np.concatenate([spikes, np.zeros((max(0, steps - T), 2, 3))])[:steps])
    close(nn.Spikes.of(jnp.asarray(spikes)).from_bits().values, spikes)
    low, span = one_of(draw, -1, 0, 1.5), one_of(draw, 1, 4, 0, 300)
    packed = call(sf.Packed, 8, low, low + span)
    graded = call(nn.PackSpikes, low, low + span)(jnp.asarray(spikes, jnp.float32) * min(span, 1) + low)
    close(call(sf.unpack, graded.bits, T, jnp.float32, **({"lowest": low} if packed.graded else {})), graded.values)


@case("explain", "Explanation", "autotune", "WithState")
def _(draw):
    xs = currents(draw)
    said = call(sf.explain, sf.LIF(), sf.LIFParams(), None, xs)
    assert "scan" in str(said)
    outs, _ = sf.unroll(sf.WithState(sf.LIF()), sf.LIFParams(), None, xs, implementation="scan")
    close(outs[0], sf.unroll(sf.LIF(), sf.LIFParams(), None, xs, implementation="scan")[0])


# ---- layers and readouts


@case("nn.spike_rate", "nn.membrane_mean", "nn.membrane_max", "nn.membrane_last", "nn.flatten")
def _(draw):
    xs = jnp.asarray(array(draw, one_of(draw, SHAPE, (1, 2), (0, 2, 3), ())), one_of(draw, *DTYPES))
    wide = np.asarray(xs, np.float64)
    for name, f in (("spike_rate", np.mean), ("membrane_mean", np.mean), ("membrane_max", np.max)):
        close(call(getattr(nn, name), xs), f(wide, axis=0), 1e-2)
    close(call(nn.membrane_last, xs), wide[-1])


@case("nn.max_pool", "nn.mean_pool")
def _(draw):
    x = jnp.asarray(
        array(draw, one_of(draw, (2, 4, 5, 1), (4, 5), (2, 1, 1, 1), (1, 0, 3, 1)), 0), one_of(draw, *DTYPES)
    )
    close(call(nn.mean_pool, x), np.asarray(x, np.float64).mean((-3, -2)), 1e-2)
    window, stride, padding = one_of(draw, 1, 2, 3, 0), one_of(draw, 1, 2, 0), one_of(draw, 0, 1, 3, -1)
    got = call(nn.max_pool, x, window, stride, padding)
    wide = np.pad(np.asarray(x, np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)), constant_values=-np.inf)
    view = np.lib.stride_tricks.sliding_window_view(wide, (window, window), (1, 2))[:, ::stride, ::stride]
    close(got, view.max((-2, -1)))


@case(
    "nn.Linear",
    "nn.Conv",
    "nn.BatchNorm",
    "nn.NormSpiking",
    "nn.Sequential",
    "nn.Folded",
    "nn.Remat",
    "nn.Timeless",
    "nn.Temporal",
)
def _(draw):
    xs, rngs = currents(draw), nnx.Rngs(0)
    dense = call(nn.Linear, one_of(draw, 3, 3, 4), 5, rngs=rngs)
    norm = call(nn.BatchNorm, one_of(draw, 5, 5, 4), rngs=rngs)
    model = call(
        nn.Sequential, dense, nn.NormSpiking(nn.LIF(tau=2.0), norm), *one_of(draw, (), (nn.Remat(nn.IF()),), (3,))
    )
    rows = call(nn.NormSpiking, nn.IF(), one_of(draw, nnx.LayerNorm, nnx.RMSNorm)(one_of(draw, 3, 4), rngs=rngs))
    assert call(rows, xs)[0].shape == xs.shape and call(rows.explain, xs).before
    outs, state = call(model, xs)
    y = np.asarray(xs, np.float64) @ np.asarray(dense.kernel[...], np.float64) + np.asarray(dense.bias[...])
    y = (y - y.mean((0, 1))) / np.sqrt(y.var((0, 1)) + norm.epsilon)
    assert outs.shape == (*xs.shape[:2], 5) and np.isin(np.asarray(outs, np.float32), (0, 1)).all()
    if len(model.layers) == 2 and xs.dtype == jnp.float32:
        v, want, margins = 0, [], []
        for x in y:
            u = 0.5 * v + x
            want.append(u >= 1), margins.append(np.abs(u - 1))
            v = np.where(u >= 1, 0, u)
        sure = (np.stack(margins) > 1e-3).all(0)
        close(np.asarray(outs)[:, sure], np.stack(want)[:, sure])


@case("nn.Pieces", "nn.piece_length")
def _(draw):
    xs, length = currents(draw), one_of(draw, *WHOLE)
    layer = nn.Sequential(nn.Linear(3, 4, rngs=nnx.Rngs(0)), nn.LI(tau=2.0))
    budget = one_of(draw, 0, 10, 1_000, 10**6)
    model = call(nn.Pieces, layer, length, statistics=one_of(draw, "refuse", "piece", "all"))
    outs, state = call(model, xs)
    want, after = call(layer, xs)
    close(outs, want), close(state[0].v, after[0].v)
    assert 1 <= call(nn.piece_length, layer, xs, budget) <= len(xs)


@case("nn.Stream")
def _(draw):
    xs, cut = currents(draw), one_of(draw, 0, 1, 2)
    layer = nn.Sequential(nn.Linear(3, 4, rngs=nnx.Rngs(0)), nn.LI(tau=2.0))
    step = jax.ShapeDtypeStruct(one_of(draw, xs.shape[1:], xs.shape[1:], xs.shape), xs.dtype)
    stream = call(nn.Stream, layer, step, read=one_of(draw, None, None, 3))
    outs = [call(stream, piece) for piece in (xs[:cut], xs[cut:]) if len(piece) or not cut]
    close(np.concatenate(outs), call(layer, xs)[0])


@case("nn.Padded")
def _(draw):
    xs, lengths = currents(draw), one_of(draw, [1, 2], [2, 1], [0, 1], [1, 999], [1.0, 2.0], [1], 1)
    layer = nn.Sequential(nn.Linear(3, 4, rngs=nnx.Rngs(0)), nn.LI(tau=2.0))
    padded = call(nn.Padded, xs, jnp.asarray(lengths))
    outs, state = call(layer, padded)
    alone = [call(layer, xs[:L, b : b + 1])[0] for b, L in enumerate(lengths)]
    close(call(nn.membrane_last, outs), np.concatenate([np.asarray(x[-1], np.float32) for x in alone]))
    assert len(padded) == len(xs)


@case("nn.TimeConv")
def _(draw):
    xs, kernel = currents(draw), one_of(draw, (2,), (3,), (0,), (-1,), (2, 3), ())
    layer = call(nn.TimeConv, 3, 4, kernel, rngs=nnx.Rngs(0))
    outs, wide = call(layer, xs)[0], np.asarray(xs, np.float64)
    taps, K = np.asarray(layer.conv.kernel[...], np.float64), kernel[0]
    want = sum(np.pad(wide, ((K - 1 - k, 0), (0, 0), (0, 0)))[: len(wide)] @ taps[k] for k in range(K))
    close(outs, want, 1e-5 if xs.dtype == jnp.float32 else 0.03)


@case("nn.Delay", "nn.DelayedLinear", "nn.sharpen")
def _(draw):
    xs, longest, sigma = currents(draw), one_of(draw, *WHOLE), one_of(draw, None, 0.7, *NUMBER)
    if not isinstance(longest, int) or longest < 100:  # others no memory holds
        options = dict(interpolation=one_of(draw, "gaussian", "triangle", "cubic"), rngs=nnx.Rngs(0))
        axonal = call(nn.Delay, 3, longest, sigma=sigma, **options)
        synaptic = call(nn.DelayedLinear, 3, 4, longest, sigma=sigma, use_bias=False, **options)
        call(nn.sharpen, one_of(draw, axonal, synaptic, nn.LIF(tau=2.0)), one_of(draw, 0.3, 1.0))
        for layer in (axonal, synaptic):
            kernel = np.asarray(layer.taps, np.float64)
            close(kernel.sum(0), np.ones(kernel.shape[1:]))
            kernel = kernel * np.asarray(layer.kernel[...]) if layer is synaptic else kernel[:, None] * np.eye(3)
            outs, wide = np.asarray(call(layer, xs)[0], np.float64), np.asarray(xs, np.float64)
            want = sum(np.pad(wide, ((k, 0), (0, 0), (0, 0)))[: len(wide)] @ w for k, w in enumerate(kernel))
            close(outs, want, 1e-5 if xs.dtype == jnp.float32 else 0.03)


@case("nn.PSN", "nn.MaskedPSN", "nn.SlidingPSN")
def _(draw):
    xs, order = currents(draw), one_of(draw, *WHOLE)
    T, rngs = one_of(draw, len(xs), len(xs), 2, 1.5), nnx.Rngs(0)
    order = 4 if order == 2**40 else order
    layers = (
        call(nn.PSN, T, rngs=rngs),
        call(nn.MaskedPSN, T, order, progress=one_of(draw, 1.0, 0.5, *NUMBER), rngs=rngs),
    )
    wide = np.asarray(xs, np.float64)
    for layer in layers:
        got = np.asarray(call(layer, xs), np.float64)
        h = np.tensordot(np.asarray(layer._weight(), np.float64), wide, 1) - 1
        sure = np.abs(h) > 1e-4
        close(got[sure], (h >= 0)[sure])
    layer = call(nn.SlidingPSN, order)
    got = np.asarray(call(layer, xs)[0], np.float64)
    h = sum(0.5**k * np.pad(wide, ((k, 0), (0, 0), (0, 0)))[: len(wide)] for k in range(order)) - 1
    sure = np.abs(h) > 1e-4
    close(got[sure], (h >= 0)[sure])


@case("nn.Quantised", "nn.TEBN")
def _(draw):
    xs, bits, T = currents(draw), one_of(draw, *WHOLE), one_of(draw, 3, *WHOLE)
    linear = nn.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))
    layer, kernel = call(nn.Quantised, linear, bits), np.asarray(linear.kernel[...], np.float64)
    step = np.abs(kernel).max(0) / (2 ** (int(bits) - 1) - 1)
    close(call(layer, xs), np.asarray(xs, np.float64) @ (np.round(kernel / step) * step), 0.03)
    norm = call(nn.TEBN, len(xs) if T == 3 else T, 3, rngs=nnx.Rngs(0))
    wide = np.asarray(xs, np.float64)
    want = (wide - wide.mean((0, 1))) / np.sqrt(wide.var((0, 1)) + norm.epsilon)
    close(call(norm, xs), want, 1e-4 if xs.dtype == jnp.float32 else 0.03)


@case("nn.Dropout")
def _(draw):
    xs, rate = array(draw, (4, 5, 6), 0.5, 2), one_of(draw, 0.25, *NUMBER)
    got = np.asarray(call(call(nn.Dropout, rate, rngs=nnx.Rngs(0)), jnp.asarray(xs)))
    kept = np.broadcast_to(got[:1] != 0, xs.shape)
    close(got, np.where(kept, xs / max(1 - rate, 1e-9), 0))
    assert kept.all() if rate == 0 else not kept.all()


@case("nn.PrecisionPolicy")
def _(draw):
    assert call(nn.PrecisionPolicy, one_of(draw, "float32", "bfloat16", "tf32", "int3", "")).value


@case(
    *(
        "online." + n
        for n in ("gradients", "sltt", "ottt", "Instant", "Traced", "TracedRecurrent", "Eprop", "RandomFeedback")
    ),
    "online.EpropConv",
    "online.Window",
)
def _(draw):
    # with a neuron that forgets everything (decay 0), every rule gives the gradient of backpropagation
    xs, length = currents(draw), one_of(draw, *WHOLE)
    neuron, rngs = nn.LIF(decay=one_of(draw, 0.0, 0.0, 0.5)), nnx.Rngs(0)
    linear = nn.Linear(3, 4, use_bias=False, rngs=rngs)
    eprop = call(
        online.Eprop, neuron, one_of(draw, 3, 3, 4), 4, recurrent=False, decay_out=one_of(draw, 0.0, *NUMBER), rngs=rngs
    )
    eprop.kernel[...] = linear.kernel[...] if eprop.in_features == 3 else 0 * eprop.kernel[...]
    model = nn.Sequential(linear, neuron)
    loss = lambda outs: outs.astype(jnp.float32).sum()
    for learner in (online.sltt(model), online.ottt(model), eprop):
        value, grads, _ = call(
            online.gradients, learner, loss, xs, length=length, reach=one_of(draw, None, None, 2, 4, -1)
        )
        close(value, loss(call(model, xs)[0]))
        got = jax.tree.leaves(nnx.to_pure_dict(grads))[0]
        if neuron.decay == 0 and xs.dtype == jnp.float32 and getattr(learner, "decay_out", 0) == 0:
            exact = nnx.grad(lambda model: loss(model(xs)[0]))(model)
            close(got, jax.tree.leaves(nnx.to_pure_dict(exact))[0], 1e-4)
    reset = one_of(draw, sf.SoftReset(detach=True), sf.NoReset(), sf.HardReset(), sf.SoftReset())
    conv = call(online.EpropConv, linear, one_of(draw, nn.LIF(tau=2.0, reset=reset), nn.LIF(tau=2.0, learn="decay"), 3))
    close(call(conv, xs)[0], call(nn.Sequential(linear, conv.neuron), xs)[0])
    layer = online.RandomFeedback(3, 4, rngs=rngs)
    close(call(layer, xs), np.asarray(xs, np.float64) @ np.asarray(layer.kernel[...]), 0.02)


# ---- training and devices


@case("training.DeviceData")
def _(draw):
    n, batch, seed = one_of(draw, 0, 1, 5), one_of(draw, 1, 2, 0, 9, -1), one_of(draw, 0, 7)
    x = np.arange(n)
    stored = call(training.DeviceData, one_of(draw, (x, x), {"a": x}, x[:, None], np.float32(1), ()), batch, seed=seed)
    seen = [np.ravel(jax.tree.leaves(stored.next()[0])[0]) for _ in range(len(stored))]
    assert len(np.unique(np.concatenate(seen))) == len(stored) * batch


@case("training.temporal_cross_entropy")
def _(draw):
    outs, labels = (
        array(draw, one_of(draw, (3, 2, 4), (1, 1, 1), (2, 4))),
        array(draw, one_of(draw, (2,), (1,)), 0, 1, np.int32),
    )
    mse, level = one_of(draw, 0.0, 0.25, *NUMBER), one_of(draw, 0.0, 1.0)
    got = call(training.temporal_cross_entropy, outs, labels, mse=mse, level=level)
    log = outs.astype(np.float64) - np.log(np.exp(outs.astype(np.float64)).sum(-1, keepdims=True))
    close(got, -(1 - mse) * log[..., 0].mean() + mse * np.square(outs.astype(np.float64) - level).mean())


@case("training.rate_penalty")
def _(draw):
    counts = array(draw, one_of(draw, (2, 3, 4), (1, 4), (4,)), 0, 10)
    lower, upper, per = (
        one_of(draw, 0.0, 0.1, *NUMBER),
        one_of(draw, 0.5, *NUMBER),
        one_of(draw, "neuron", "layer", "x"),
    )
    got = call(training.rate_penalty, {"a": counts}, one_of(draw, 10, 10, 0, -1), lower=lower, upper=upper, per=per)
    rate = counts.astype(np.float64).mean(0 if per == "neuron" else None) / 10
    if upper < 1e9:
        close(got, np.mean(np.maximum(rate - upper, 0) ** 2 + np.maximum(lower - rate, 0) ** 2))


@case("training.parameter_groups", "training.update_average")
def _(draw):
    models = [nn.Sequential(nn.Linear(2, one_of(draw, 2, 2, 3), rngs=nnx.Rngs(i)), nn.LIF(tau=2.0)) for i in (0, 1)]
    groups = [group for _, group in nnx.to_flat_state(training.parameter_groups(models[0]))]
    assert groups == ["bias", "weight"]
    decay = one_of(draw, 0.5, *NUMBER)
    old, new = (np.asarray(model.layers[0].kernel[...], np.float64) for model in models)
    call(training.update_average, *models, decay)
    close(models[0].layers[0].kernel[...], decay * old + (1 - decay) * new)


@case("training.settings", "training.compare_settings", "training.to_arrays", "training.from_arrays")
def _(draw):
    decays = one_of(draw, 0.25, 0.5), one_of(draw, 0.25, 0.5)
    found = [training.settings(nn.LIF(decay=d)) for d in decays]
    try:
        call(training.compare_settings, *found)
        assert decays[0] == decays[1]
    except Refused:
        assert decays[0] != decays[1]
    model = nn.Linear(2, 3, rngs=nnx.Rngs(0))
    arrays = training.to_arrays(model)
    training.from_arrays({name: x + 1 for name, x in arrays.items()}, model)
    close(model.bias[...], np.ones(3))


@case("parallel.make_mesh", "parallel.host_rows", "parallel.shard", "parallel.fold_key", "parallel.mean_gradients")
def _(draw):
    x = array(draw, (3, 2))
    close(parallel.mean_gradients({"w": x})["w"], x)
    assert parallel.fold_key(jax.random.key(3)) == jax.random.key(3)
    rows = call(parallel.host_rows, one_of(draw, 8, 7, 0), one_of(draw, 1, 2), one_of(draw, 0, 1))
    assert rows.stop - rows.start >= 0
    mesh = call(
        parallel.make_mesh, one_of(draw, "data=1", "data=1,time=1", "data=0", "data", "", "a=b", {"data": 1.5}, {})
    )
    spec = jax.sharding.PartitionSpec(one_of(draw, "data", None, "other"))
    close(call(parallel.shard, x, mesh, spec), x)


# ---- what has no case, and why

EXCLUDED = {
    **dict.fromkeys(
        [
            f"{n}{part}"
            for n in ("IF", "LIF", "LI", "CubaLIF", "AdaptiveLIF", "ExpIF", "Izhikevich")
            for part in ("Params", "State")
        ],
        "a NamedTuple: a container of arrays",
    ),
    **dict.fromkeys(
        ("Neuron", "RecurrentState", "online.EpropState", "nn.Fixed", "data.events.Sensor", "training.CompiledStep"),
        "a type that holds",
    ),
    **dict.fromkeys(("HardReset", "SoftReset", "NoReset"), "fuzzed as the `reset` of neurons"),
    **dict.fromkeys(("data.events.BadSample", "data.events.Unsorted"), "errors"),
    **dict.fromkeys(("training.save", "training.restore"), "write files: test_checkpoint.py"),
    "training.compiled_step": "compiles what it is given: test_training.py",
    "data.loader.require": "imports a package",
    **dict.fromkeys(
        [
            f"data.catalog.{n}"
            for n in (
                "builder",
                "data_dir",
                "data_set",
                "is_prepared",
                "own_names",
                "prepare",
                "prepared",
                "prepared_in",
                "sound_rate",
                "source",
                "require",
            )
        ],
        "find and prepare data sets on disk: test_data_builders.py, test_data_command.py",
    ),
    **dict.fromkeys(
        [
            "parallel." + n
            for n in ("LayerCost", "Machine", "OverTime", "Plan", "data_parallel", "flatten_optimizer", "global_batch")
        ]
        + [
            "parallel." + n
            for n in ("initialise", "over_time", "plan_meshes", "pmapped", "readout", "synchronise_batch_norm")
        ]
        + ["parallel.unroll_over_time"],
        "need several devices or hosts, or plan for them: test_parallel.py, on_8_devices.py",
    ),
}


def public():
    """Every public function and class: the names in __all__, and those that the modules of snnfuse.data define."""
    named = [
        (part, module)
        for part, module in (
            ("", sf),
            ("nn.", nn),
            ("online.", online),
            ("training.", training),
            ("parallel.", parallel),
        )
    ]
    found = {part + name for part, module in named for name in module.__all__ if callable(getattr(module, name))}
    found |= {"interop.snntorch." + name for name in snntorch.__all__}
    for module in (getattr(data, name) for name in data.__all__):
        for name, value in vars(module).items():
            if not name.startswith("_") and callable(value) and hasattr(value, "__name__"):
                if getattr(value, "__module__", "") == module.__name__:
                    found.add(f"data.{module.__name__.rpartition('.')[2]}.{name}")
    return found


def test_every_public_function_has_a_case_or_a_reason():
    names = public()
    assert names - CASES.keys() - EXCLUDED.keys() == set(), "write a case, or say why there is none"
    assert CASES.keys() - names == {"data.formats"} and not CASES.keys() & EXCLUDED.keys()
    assert all(len(reason) >= 6 for reason in EXCLUDED.values())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("f", dict.fromkeys(CASES.values()), ids={f: n for n, f in reversed(CASES.items())}.get)
def test_fuzz(f):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    settled = settings(max_examples=EXAMPLES * (6 if f.__doc__ or "data.events" in NAME[f] else 1), derandomize=EXAMPLES < 50,
                       deadline=None, database=None, suppress_health_check=checks)  # fmt: skip

    @settled
    @given(st.data())
    def run(data):
        try:
            f(data.draw)
        except Refused:
            pass

    with jax.disable_jit():
        run()


NAME = {f: n for n, f in reversed(CASES.items())}
