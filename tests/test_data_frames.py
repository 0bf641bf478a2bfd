"""Events to frames: SpikingJelly's splits to the last event, conservation, and the device agreeing with the host."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snnfuse.data import augment as au
from snnfuse.data import events as ev
from snnfuse.data import loader
from snnfuse.data import packed as pk
from snnfuse.data.loader import Frames, PackedFrames

SENSOR = ev.Sensor(5, 7, 2)
GOLDEN = Path(__file__).parent / "golden" / "spikingjelly_frames.npz"


def recording(n: int, seed: int = 0, span: int = 10_000, sensor: ev.Sensor = SENSOR) -> ev.Events:
    rng = np.random.default_rng(seed)
    return {
        "t": np.sort(rng.integers(1000, 1000 + span, n)).astype(np.uint32),
        "x": rng.integers(0, sensor.width, n).astype(np.uint8),
        "y": rng.integers(0, sensor.height, n).astype(np.uint8),
        "p": rng.integers(0, sensor.polarities, n).astype(bool),
    }


def test_golden_vector_of_spikingjelly():
    """Made by tests/golden/make_spikingjelly_frames.py with SpikingJelly 2.0.0."""
    golden = np.load(GOLDEN)
    events = {column: golden[column] for column in "txyp"}
    sensor = ev.Sensor(*golden["sensor"].tolist())
    for split in ("number", "time"):
        for T in golden["T"].tolist():
            ours = ev.to_frames(events, sensor, T, split=split)
            assert np.array_equal(ours.transpose(0, 3, 1, 2), golden[f"{split}_{T}"]), (split, T)
    for dt in golden["dt"].tolist():
        ours = ev.to_frames(events, sensor, split="dt", dt=dt)
        assert np.array_equal(ours.transpose(0, 3, 1, 2), golden[f"dt_{dt}"]), dt


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), T=st.integers(1, 40), span=st.sampled_from([1, 30, 10_000]), seed=st.integers(0, 99))
def test_no_event_lost_or_invented(n, T, span, seed):
    events = recording(n, seed, span)
    whole = np.bincount(ev.addresses(events, SENSOR), minlength=SENSOR.size).reshape(SENSOR)
    for frames in (
        ev.to_frames(events, SENSOR, T, split="number"),
        ev.to_frames(events, SENSOR, T, split="time"),
        ev.to_frames(events, SENSOR, split="dt", dt=max(1, span // T)),
    ):
        assert np.array_equal(frames.sum(0), whole)
    assert np.isclose(ev.voxel_grid(events, SENSOR, T).sum(), (2.0 * events["p"] - 1).sum(), atol=1e-3)


def test_a_window_keeps_what_is_inside_it():
    events = recording(500)
    frames = ev.to_frames(events, SENSOR, 4, split="dt", dt=1000)
    inside = events["t"] < events["t"][0] + 4000
    assert 0 < inside.sum() < 500 and frames.sum() == inside.sum()
    assert not ev.to_frames(events, SENSOR, 30, split="dt", dt=1000)[12:].any()  # padded


def test_one_polarity_has_one_channel():
    sensor = ev.Sensor(1, 700, 1)
    events = recording(200, sensor=sensor) | {"x": np.arange(200, dtype=np.uint16) * 3, "p": np.ones(200, bool)}
    frames = ev.to_frames(events, sensor, 4)
    assert frames.shape == (4, 1, 700, 1) and frames.sum() == 200
    assert np.array_equal(frames.sum((0, 1, 3)).nonzero()[0], np.arange(200) * 3)


def test_voxel_grid_is_its_equation():
    events, T = recording(80), 6
    t = events["t"].astype(float)
    s = (T - 1) * (t - t[0]) / (t[-1] - t[0])
    wanted = np.zeros((T, *SENSOR[:2], 1))
    for k in range(T):
        for i in range(80):
            sign = 1 if events["p"][i] else -1
            wanted[k, events["y"][i], events["x"][i], 0] += sign * max(0, 1 - abs(k - s[i]))
    np.testing.assert_allclose(ev.voxel_grid(events, SENSOR, T), wanted, atol=1e-5)


def test_time_surface_is_tonics():
    tonic = pytest.importorskip("tonic", reason="tonic is in the extra `data`")
    events = recording(400)
    structured = np.rec.fromarrays([events[c].astype(np.int64) for c in "xytp"], names="x,y,t,p")
    wanted = tonic.functional.to_timesurface_numpy(structured, (7, 5, 2), dt=1000, tau=3000)
    ours = ev.time_surface(events, SENSOR, len(wanted), 1000, 3000)
    assert len(wanted) >= 8
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), wanted, rtol=1e-6)


@pytest.mark.parametrize("split, dt", [("number", None), ("time", None), ("dt", 777)])
def test_device_bins_as_the_host_does(split, dt):
    T, size = 8, 400
    batch = [recording(n, seed) for seed, n in enumerate((1, 5, 8, 100, 399, 400))]
    packed = jnp.asarray(np.stack([pk.pack_events(events, SENSOR, size) for events in batch]))
    frames = pk.bin_events(packed, SENSOR, T, split=split, dt=dt, dtype=jnp.int32)
    assert frames.shape == (T, len(batch), *SENSOR)
    for b, events in enumerate(batch):
        assert np.array_equal(frames[:, b], ev.to_frames(events, SENSOR, T, split=split, dt=dt)), b
    assert np.array_equal(frames[:, 4], pk.bin_events(packed[4], SENSOR, T, split=split, dt=dt))


@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (2, 8), (1, 1), (3, 34, 34, 2)])
def test_bits_round_trip(shape):
    spikes = np.random.default_rng(0).integers(0, 3, shape)
    bits = pk.pack_bits(spikes)
    assert bits.dtype == np.uint8 and bits.shape == (shape[0], -(-np.prod(shape[1:]) // 8))
    assert np.array_equal(pk.unpack_bits(bits, shape[1:]), spikes != 0)


def test_bytes_never_wrap():
    with pytest.raises(OverflowError, match="256 events"):
        ev.to_uint8(np.array([256]))
    assert ev.to_uint8(np.array([3, 256]), saturate=True).tolist() == [3, 255]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"t": np.arange(3)}, "columns of different lengths"),
        ({"x": np.array([0, 7, 0, 0])}, "event 1 has x = 7, outside 0..6"),
        ({"y": np.array([0, 0, -1, 0])}, "event 2 has y = -1, outside 0..4"),
        ({"p": np.array([0, 0, 0, 2])}, "event 3 has p = 2, outside 0..1"),
        ({"p": np.array([1, -1, 0, 1])}, "event 2 has p = 0, but others have -1"),
        ({"p": np.array([1, -1, 1, 2])}, "event 3 has p = 2, but others have -1"),
        ({"x": np.array([0, 1, 2.5, 3])}, "event 2 has x = 2.5, which is no whole number"),
        ({"x": np.array(["0", "1", "2", "3"])}, "column x must be whole numbers"),
        ({"t": np.array([0, np.nan, 1, 2])}, "event 1 has t = nan"),
        ({"t": np.array([0, 0.25, 0.5, 0.75])}, "event 1 has t = 0.25, .*multiply seconds by 1e6"),
        ({"t": np.array([0, 1, 2, 2**63], np.uint64)}, "event 3 has t = 9223372036854775808, outside"),
        ({"t": np.array([5, 6, 2, 9])}, "event 2 has t = 2, before 6; 1 such"),
    ],
)
def test_faults_are_named(change, message):
    with pytest.raises(ev.BadSample, match=f"file 9: {message}"):
        ev.check(recording(4) | change, SENSOR, "file 9")


def test_wrong_calls_are_errors():
    events = recording(10)
    for wrong in ({"split": "size"}, {"split": "number"}, {"split": "dt"}, {"split": "dt", "dt": 0}):
        with pytest.raises(ValueError):
            ev.to_frames(events, SENSOR, **wrong)
    with pytest.raises(ValueError, match="does not fit"):
        pk.pack_events(events, SENSOR, 9)
    with pytest.raises(ValueError, match="packed must be uint8"):
        pk.unpack_bits(jnp.zeros((2, 3), jnp.uint8), (9,))
    with pytest.raises(ValueError, match="needs dt"):
        pk.bin_events(jnp.zeros((2, 2), jnp.uint32), SENSOR, 3, split="dt")


DOORS = {
    "to_frames": lambda events, **options: ev.to_frames(events, SENSOR, 4, **options),
    "to_frames by time": lambda events, **options: ev.to_frames(events, SENSOR, 4, split="time", **options),
    "to_frames by dt": lambda events, **options: ev.to_frames(events, SENSOR, 4, split="dt", dt=9, **options),
    "voxel_grid": lambda events, **options: ev.voxel_grid(events, SENSOR, 4, **options),
    "time_surface": lambda events, **options: ev.time_surface(events, SENSOR, 4, 9, 5.0, **options),
    "pack_events": lambda events, **options: pk.pack_events(events, SENSOR, 50, **options),
    "Frames": lambda events, **options: Frames(SENSOR, 4, **options)({"events": events, "label": 0}, None)["frames"],
    "PackedFrames": lambda events, **options: PackedFrames(SENSOR, 4, 50, **options)(
        {"events": events, "label": 0}, None
    )["frames"],
    "addresses": lambda events: ev.addresses(events, SENSOR),
    "count_events": lambda events: ev.count_events(events, np.zeros(len(events["t"]), int), 4, SENSOR),
    "flip": lambda events: au.flip(events, SENSOR)["x"],
    "shift": lambda events: au.shift(events, SENSOR, 1, 1)["x"],
    "Augment": lambda events: au.Augment(flip=1.0, crop=(2, 2))(events, SENSOR, np.random.default_rng(0))["x"],
}
ORDERED = [name for name in DOORS if name not in ("addresses", "count_events", "flip", "shift", "Augment")]


@pytest.mark.parametrize("door", DOORS)
def test_every_door_checks_the_events(door):
    events = recording(40, seed=3)
    assert 0.2 < events["p"].mean() < 0.8
    signed = events | {"p": np.where(events["p"], 1, -1)}
    assert np.array_equal(DOORS[door](signed), DOORS[door](events))
    for column, value, wanted in (("x", -1, "0..6"), ("x", 7, "0..6"), ("y", 5, "0..4"), ("p", 2, "0..1")):
        wrong = events[column].astype(int)
        wrong[11] = value
        with pytest.raises(ev.BadSample, match=f"event 11 has {column} = {value}, outside {wanted}"):
            DOORS[door](events | {column: wrong})
    with pytest.raises(ev.BadSample, match="multiply seconds by 1e6"):
        DOORS[door](events | {"t": events["t"] * 1e-6})


@pytest.mark.parametrize("door", ORDERED)
def test_unordered_times_raise_or_are_sorted(door):
    events = recording(40, seed=3)
    mixed = {column: values[::-1] for column, values in events.items()}
    with pytest.raises(ev.Unsorted, match="event 1 has t = .*, before"):
        DOORS[door](mixed)
    order = np.argsort(mixed["t"], kind="stable")
    wanted = DOORS[door]({column: values[order] for column, values in mixed.items()})
    assert np.array_equal(DOORS[door](mixed, on_unsorted="sort"), wanted) and wanted.any()
    with pytest.raises(ValueError, match="on_unsorted must be 'raise' or 'sort'; got 'skip'"):
        DOORS[door](events, on_unsorted="skip")


@pytest.mark.parametrize("door", [name for name in DOORS if name != "pack_events" and name != "PackedFrames"])
@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.uint8])
def test_an_empty_recording_gives_empty_frames(door, dtype):
    result = DOORS[door]({column: np.empty(0, dtype) for column in "txyp"})
    assert not np.any(result) and len(result) == (0 if door not in ORDERED and door != "count_events" else 4)


def test_an_empty_recording_is_packed_as_no_event():
    packed = pk.pack_events({column: np.empty(0, int) for column in "txyp"}, SENSOR, 3)
    assert np.array_equal(packed, np.full((3, 2), pk.PADDING))
    for split, dt in (("number", None), ("time", None), ("dt", 5)):
        assert not pk.bin_events(packed, SENSOR, 4, split=split, dt=dt).any()
    assert ev.to_frames({column: [] for column in "txyp"}, SENSOR, split="dt", dt=5).shape == (1, *SENSOR)


def test_a_recording_too_long_for_32_bits_is_an_error():
    events = recording(3) | {"t": np.array([5, 6, 5 + 2**32])}
    with pytest.raises(ev.BadSample, match="film: event 2 has t = 4294967301, 4294967296 after the first"):
        pk.pack_events(events, SENSOR, 3, "film")
    assert pk.pack_events(events | {"t": events["t"] - [0, 0, 1]}, SENSOR, 3)[2, 0] == 2**32 - 1


def test_the_loader_names_the_sample():
    pytest.importorskip("grain", reason="the loader needs the extra `data`")
    good, bad = recording(9), recording(9) | {"x": np.full(9, 7)}
    source = [{"events": events, "label": 0} for events in (good, good, bad)]
    batches = loader.load(source, Frames(SENSOR, 2), batch=3, shuffle=False, device=False)
    with pytest.raises(ev.BadSample, match="^sample 2: event 0 has x = 7, outside 0..6"):
        next(iter(batches))


def test_large_counts_do_not_wrap_on_the_device():
    events = {column: np.zeros(300, int) for column in "txyp"}
    packed = pk.pack_events(events, SENSOR, 300)
    assert pk.bin_events(packed, SENSOR, 1, dtype=jnp.uint8).max() == 255
    assert pk.bin_events(packed, SENSOR, 1, dtype=jnp.int8).max() == 127
    assert pk.bin_events(packed, SENSOR, 1).max() == 300
    with pytest.raises(ValueError, match=r"2\^31 - 1 fit"):
        pk.bin_events(packed, SENSOR, 2**27)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), split=st.sampled_from(["number", "time", "dt"]), seed=st.integers(0, 2**31))
def test_host_and_device_agree_on_every_input(data, split, seed):
    """Random, unordered, repeated and extreme events: the same frames, or the same error."""
    rng = np.random.default_rng(seed)
    n, T = data.draw(st.sampled_from([0, 1, 2, 7, 64])), data.draw(st.sampled_from([1, 3, 8]))
    span = data.draw(st.sampled_from([1, 50, 2**20, 2**32, 2**33, 2**62]))
    start = data.draw(st.sampled_from([0, -5, 2**40, -(2**61)]))
    dt = data.draw(st.sampled_from([1, 1000, 2**31, 2**32, 2**40])) if split == "dt" else None
    t = rng.integers(0, span, n) + start
    t = np.sort(t) if data.draw(st.booleans()) else t
    low, high = data.draw(st.sampled_from([(0, 2), (-1, 2), (0, 3)]))
    p = rng.choice([-1, 1], n) if low < 0 else rng.integers(low, high, n)
    events = {"t": t, "p": p, "x": rng.integers(0, data.draw(st.sampled_from([7, 8])), n), "y": rng.integers(0, 5, n)}
    results = []
    for frames in (
        lambda: ev.to_frames(events, SENSOR, T, split=split, dt=dt),
        lambda: pk.bin_events(pk.pack_events(events, SENSOR, 64), SENSOR, T, split=split, dt=dt, dtype=jnp.int32),
    ):
        try:
            results.append(np.asarray(frames()))
        except ev.BadSample as fault:
            results.append(str(fault))
    if isinstance(results[1], str) and "do not fit 32 bits" in results[1]:
        assert not isinstance(results[0], str) and t[-1] - t[0] >= 2**32
    else:
        assert type(results[0]) is type(results[1]) and np.array_equal(results[0], results[1])
