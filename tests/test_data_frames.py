"""Events to frames: SpikingJelly's splits to the last event, conservation, and the device agreeing with the host."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snnfuse.data import events as ev
from snnfuse.data import packed as pk

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
        ({c: np.zeros(0) for c in "txyp"}, "no events"),
        ({"x": np.array([0, 7, 0, 0])}, "event 1 has x = 7, outside 0..6"),
        ({"y": np.array([0, 0, -1, 0])}, "event 2 has y = -1, outside 0..4"),
        ({"p": np.array([0, 0, 0, 2])}, "event 3 has p = 2, outside 0..1"),
        ({"t": np.array([0, np.nan, 1, 2])}, "event 1 has t = nan"),
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
    with pytest.raises(ValueError, match="split must be"):
        pk.bin_events(jnp.zeros((2, 2), jnp.uint32), SENSOR, 3, split="dt")
