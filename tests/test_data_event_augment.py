"""Random changes of packed events and of signals: against the host's, by their statistics, and that they are keyed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_data_formats import recording

from snnfuse.data import augment, event_augment, packed, signals
from snnfuse.data import events as ev

KEY, SENSOR = jax.random.key(0), ev.Sensor(20, 30)
RECORDINGS = [recording(n, n, SENSOR) for n in (200, 150, 180, 120)]
PACKED = jnp.stack([packed.pack_events(events, SENSOR, 256) for events in RECORDINGS])


def places(one, sensor=SENSOR):
    """[n, 4] of a packed recording: t, x, y, p of the events that are there."""
    one = np.asarray(one)
    t, address = one[one[:, 1] != packed.PADDING].astype(np.int64).T
    pixel = address // sensor.polarities
    return np.stack([t, pixel % sensor.width, pixel // sensor.width, address % sensor.polarities], 1)


def test_nothing_asked_for_changes_nothing():
    np.testing.assert_array_equal(event_augment.move(KEY, PACKED, SENSOR), PACKED)
    np.testing.assert_array_equal(event_augment.drop(KEY, PACKED, 0.0), PACKED)
    np.testing.assert_array_equal(event_augment.resize(PACKED, SENSOR, 20, 30), PACKED)


def test_a_mirrored_and_moved_recording_is_the_hosts():
    for i, events in enumerate(RECORDINGS):
        mirrored = packed.pack_events(augment.flip(events, SENSOR), SENSOR, 256)
        np.testing.assert_array_equal(event_augment.move(KEY, PACKED, SENSOR, flip=1.0)[i], mirrored)
    moved = event_augment.move(KEY, PACKED, SENSOR, shift=6.0)
    found = set()
    for i, events in enumerate(RECORDINGS):
        theirs = {
            (dx, dy): packed.pack_events(augment.shift(events, SENSOR, dx, dy), SENSOR, 256)
            for dx in range(-6, 7)
            for dy in range(-6, 7)
        }
        at = events["t"][0]  # the host counts from the first event that is left
        shifts = {
            d: places(one) + [[augment.shift(events, SENSOR, *d)["t"][0] - at, 0, 0, 0]] for d, one in theirs.items()
        }
        same = [d for d, one in shifts.items() if np.array_equal(one, places(moved[i]))]
        assert len(same) == 1
        found |= set(same)
    assert len(found) == 4


def test_scale_and_turn_keep_the_middle_and_move_the_rest():
    square = ev.Sensor(41, 41)
    cross = {"t": np.arange(4), "x": np.array([20, 30, 20, 10]), "y": np.array([20, 20, 10, 20]), "p": np.ones(4, int)}
    many = jnp.tile(packed.pack_events(cross, square, 4)[None], (64, 1, 1))
    larger = np.stack([places(one, square) for one in event_augment.move(KEY, many, square, scale=1.0)])
    assert (larger[:, 0, 1:3] == 20).all()
    factor = (larger[:, 1, 1] - 20) / 10
    assert (
        0.5 <= factor.min() < 0.65
        and 1.6 < factor.max() <= 2
        and (np.abs(larger[:, 1, 1] + larger[:, 3, 1] - 40) <= 1).all()
    )
    turned = np.stack([places(one, square) for one in event_augment.move(KEY, many, square, turn=90.0)]) - [
        0,
        20,
        20,
        0,
    ]
    assert (turned[:, 0, 1:3] == 0).all()
    angle = np.arctan2(turned[:, 1, 2], turned[:, 1, 1])
    assert -1.6 < angle.min() < -1.2 and 1.2 < angle.max() < 1.6
    np.testing.assert_allclose(np.hypot(turned[:, 1, 1], turned[:, 1, 2]), 10, atol=0.75)
    np.testing.assert_allclose(turned[:, 2, 1:3], np.stack([turned[:, 1, 2], -turned[:, 1, 1]], 1), atol=1)


def test_drop_removes_up_to_its_part_and_frames_count_the_rest():
    left = event_augment.drop(KEY, jnp.tile(PACKED[:1], (64, 1, 1)), 0.5)
    kept = np.array([len(places(one)) for one in left]) / 200
    assert 0.45 < kept.min() < 0.6 and 0.92 < kept.max() <= 1 and 0.68 < kept.mean() < 0.82
    for split in ("number", "time"):
        frames = packed.bin_events(left, SENSOR, 5, split=split)
        some = places(left[3])
        events = dict(zip("txyp", some.T, strict=True))
        events["t"] = events["t"] - events["t"][0] * (split == "number")
        bins = (
            ev.split_by_number(some[:, 0], 5) if split == "number" else np.minimum(some[:, 0] // (some[-1, 0] // 5), 4)
        )
        np.testing.assert_array_equal(frames[:, 3], ev.count_events(events, bins, 5, SENSOR))


def test_resize_keeps_every_event():
    small = event_augment.resize(PACKED, SENSOR, 5, 10)
    frames = packed.bin_events(small, ev.Sensor(5, 10), 3)
    whole = packed.bin_events(PACKED, SENSOR, 3)
    np.testing.assert_array_equal(frames, whole.reshape(3, 4, 5, 4, 10, 3, 2).sum((3, 5)))


SIGNAL = jax.random.normal(KEY, (6, 50, 3))


def test_windows_of_a_signal_and_their_level():
    cut = signals.windows(SIGNAL, 20, 10)
    assert cut.shape == (4, 6, 20, 3)
    np.testing.assert_array_equal(cut[2], SIGNAL[:, 20:40])
    want = np.log(0.5 + np.sqrt(np.square(np.asarray(SIGNAL, np.float64))[:, 10:30].mean(1)))
    np.testing.assert_allclose(signals.log_rms(SIGNAL, 20, 10, 0.5)[1], want, rtol=1e-5, atol=1e-6)


def test_random_changes_of_signals():
    pieces = np.asarray(signals.piece(KEY, SIGNAL, 40))
    starts = [[a for a in range(11) if np.array_equal(SIGNAL[i, a : a + 40], pieces[i])] for i in range(6)]
    assert all(len(a) == 1 for a in starts) and len({a[0] for a in starts}) > 2
    np.testing.assert_array_equal(signals.piece(KEY, SIGNAL, 40, random=False), SIGNAL[:, 5:45])
    factor = np.asarray(signals.gain(KEY, SIGNAL, 1.0) / SIGNAL)
    np.testing.assert_allclose(factor, factor[:, :1].repeat(50, 1), rtol=1e-5)
    assert 0.5 <= factor.min() < 0.8 and 1.3 < factor.max() <= 2 and len(np.unique(factor[:, 0].round(4))) == 18
    added = np.asarray(signals.noise(KEY, SIGNAL, 0.5) - SIGNAL).std((1, 2))
    assert 0 < added.min() < 0.2 and 0.25 < added.max() < 0.6


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"packed must be uint32 \[B, n, 2\]; got float32 \(3, 2\)"):
        event_augment.drop(KEY, jnp.ones((3, 2)), 0.5)
    with pytest.raises(ValueError, match=r"most must be in \[0, 1\]; got 2"):
        event_augment.drop(KEY, PACKED, 2.0)
    with pytest.raises(ValueError, match=r"turn must be in \[0, 180\]; got 200"):
        event_augment.move(KEY, PACKED, SENSOR, turn=200.0)
    with pytest.raises(ValueError, match="width must be at most the 50 steps of xs; got 51"):
        signals.windows(SIGNAL, 51, 1)
    with pytest.raises(ValueError, match=r"xs must be floating \[B, n, C\].*; got int32 of shape \(2, 3, 4\)"):
        signals.noise(KEY, jnp.ones((2, 3, 4), jnp.int32), 0.1)
    with pytest.raises(ValueError, match="most must be at least 0 and finite; got -1"):
        signals.gain(KEY, SIGNAL, -1.0)


def test_a_piece_is_a_stretch_of_the_recording_with_its_own_times():
    many = jnp.tile(PACKED[:1], (64, 1, 1))
    whole = places(PACKED[0])
    made, durations = event_augment.piece(KEY, many, 100_000, 1.0), []
    for one in made:
        one = places(one)
        (at,) = [i for i in range(len(whole) - len(one) + 1) if np.array_equal(whole[i : i + len(one), 1:], one[:, 1:])]
        assert len(set(whole[at : at + len(one), 0] - one[:, 0])) == 1 and one[0, 0] >= 0
        durations.append(one[-1, 0])
    assert 80_000 < min(durations) < 110_000 and 170_000 < max(durations) < 200_000
    plain = [places(one)[-1, 0] for one in event_augment.piece(KEY, many, 100_000)]
    assert max(plain) < 100_000 and np.mean(plain) > 93_000
