"""The loader: every sample once an epoch, disjoint shards, the same batches from any position, on any number of workers."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snnfuse.data import augment as au
from snnfuse.data import events as ev
from snnfuse.data import packed as pk
from snnfuse.data.loader import Frames, Images, PackedFrames, load

grain = pytest.importorskip("grain", reason="the loader needs the extra `data`")

SENSOR = ev.Sensor(6, 9)
AUGMENT = au.Augment(flip=0.5, shift=2, jitter=300.0, drop=0.3)


class Recordings:
    """40 recordings; the label of each is its index."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        rng = np.random.default_rng(int(i))
        n = 60 + int(i)
        events = {"t": np.sort(rng.integers(0, 20_000, n)).astype(np.uint32), "p": rng.integers(0, 2, n).astype(bool)}
        events |= {"x": rng.integers(0, 9, n).astype(np.uint8), "y": rng.integers(0, 6, n).astype(np.uint8)}
        return {"events": events, "label": int(i)}


SOURCE = Recordings()
AS_THEY_ARE = Frames(SENSOR, T=5)
AUGMENTED = Frames(SENSOR, T=5, augment=AUGMENT)


def equal(a, b) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_every_sample_once_an_epoch_in_another_order():
    batches = list(load(SOURCE, AS_THEY_ARE, batch=8, epochs=2, seed=3))
    labels = np.concatenate([batch["label"] for batch in batches]).reshape(2, 40)
    assert all(sorted(epoch) == list(range(40)) for epoch in labels.tolist())
    assert not np.array_equal(labels[0], labels[1]) and not np.array_equal(labels[0], np.arange(40))
    assert all(isinstance(batch["frames"], jax.Array) for batch in batches)
    in_order = load(SOURCE, AS_THEY_ARE, batch=7, epochs=1, shuffle=False, drop_remainder=False)
    assert [len(batch["label"]) for batch in in_order] == [7] * 5 + [5]


@pytest.mark.parametrize("store", ["bits", "bytes"])
@pytest.mark.parametrize("split", ["number", "time"])
def test_batches_unpack_to_the_frames_of_their_samples(store, split):
    frames = Frames(SENSOR, T=5, store=store, split=split)
    batch = next(iter(load(SOURCE, frames, batch=8, seed=1)))
    xs = jax.jit(frames.unpack)(batch["frames"])
    assert xs.shape == (5, 8, 6, 9, 2) and xs.dtype == jnp.float32 and batch["frames"].dtype == jnp.uint8
    for b, label in enumerate(batch["label"].tolist()):
        counts = ev.to_frames(SOURCE[label]["events"], SENSOR, 5, split=split)
        assert np.array_equal(xs[:, b], counts != 0 if store == "bits" else counts)


def test_packed_events_are_the_same_frames_binned_on_the_device():
    packed, counted = PackedFrames(SENSOR, T=5, size=128), Frames(SENSOR, T=5, store="bytes")
    a, b = (next(iter(load(SOURCE, example, batch=8, seed=1))) for example in (packed, counted))
    assert a["frames"].shape == (8, 128, 2)
    assert np.array_equal(jax.jit(packed.unpack)(a["frames"]), counted.unpack(b["frames"]))


def test_shards_are_disjoint_and_equally_long():
    shards = [list(load(SOURCE, AS_THEY_ARE, batch=4, epochs=1, shard=(i, 3), device=False)) for i in range(3)]
    seen = [set(np.concatenate([batch["label"] for batch in shard]).tolist()) for shard in shards]
    assert [len(shard) for shard in shards] == [3, 3, 3] and [len(labels) for labels in seen] == [12, 12, 12]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_resumes_exactly_from_a_position():
    batches = load(SOURCE, AUGMENTED, batch=8, seed=5)
    iterator = iter(batches)
    for _ in range(7):  # into the second epoch
        next(iterator)
    position = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it
    wanted = [next(iterator) for _ in range(6)]
    again = iter(load(SOURCE, AUGMENTED, batch=8, seed=5))
    again.set_state(position)
    assert all(equal(next(again), batch) for batch in wanted)
    other = next(iter(load(SOURCE, AUGMENTED, batch=8, seed=6)))
    assert not equal(other, next(iter(batches)))


@pytest.mark.parametrize("start", [0, 3, 7])
def test_a_loader_that_starts_later_gives_the_same_batches(start):
    wanted = list(load(SOURCE, AUGMENTED, batch=8, seed=5, epochs=2, device=False))[start:]
    got = list(load(SOURCE, AUGMENTED, batch=8, seed=5, epochs=2, start=start, device=False))
    assert len(got) == len(wanted) == 10 - start and all(map(equal, got, wanted))
    iterator = iter(load(SOURCE, AUGMENTED, batch=8, seed=5, start=start, device=False))
    next(iterator)
    assert iterator.get_state()["next_batch"] == start + 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 4}, "saved by a loader with batch=8, but this one has batch=4"),
        ({"seed": 6}, "seed=5, but this one has seed=6"),
        ({"shuffle": False}, "shuffle=True, but this one has shuffle=False"),
        ({"shard": (1, 2)}, r"shard=\(0, 1\), but this one has shard=\(1, 2\)"),
        ({"drop_remainder": False}, "drop_remainder=True"),
        ({"source": [SOURCE[0]] * 39}, "samples=40, but this one has samples=39"),
    ],
)
def test_a_position_of_a_loader_with_other_samples_is_an_error(change, message):
    arguments = {"source": SOURCE, "example": AUGMENTED, "batch": 8, "seed": 5}
    position = json.loads(json.dumps(iter(load(**arguments)).get_state()))
    with pytest.raises(ValueError, match=message):
        iter(load(**arguments | change)).set_state(position)
    with pytest.raises(ValueError, match="position must have the keys"):
        iter(load(**arguments)).set_state({"next_index": 3})


def test_workers_and_threads_change_nothing_but_the_time():
    plain = load(SOURCE, AUGMENTED, batch=8, seed=5, epochs=2, threads=1, device=False)
    wanted = list(plain)
    parallel = load(SOURCE, AUGMENTED, batch=8, seed=5, epochs=2, workers=2, threads=3)
    iterator = iter(parallel)
    got = [next(iterator) for _ in range(4)]
    position = iterator.get_state()
    got += list(iterator)
    assert len(got) == len(wanted) == 10 and all(map(equal, got, wanted))
    resumed = iter(load(SOURCE, AUGMENTED, batch=8, seed=5, epochs=2, workers=2, threads=3))
    resumed.set_state(position)
    assert equal(next(resumed), wanted[4])


def test_batches_are_placed_as_asked():
    mesh = jax.make_mesh((1,), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batch = next(iter(load(SOURCE, AS_THEY_ARE, batch=8, device=sharding)))
    assert batch["frames"].sharding == sharding
    assert isinstance(next(iter(load(SOURCE, AS_THEY_ARE, batch=8, device=False)))["frames"], np.ndarray)


def test_images_are_bytes_until_the_device():
    class Pictures(Recordings):
        def __getitem__(self, i):
            return {
                "image": np.full((4, 5, 1), int(i), np.uint8) + np.arange(5, dtype=np.uint8)[:, None],
                "label": int(i),
            }

    images = Images(flip=0.5)
    batch = next(iter(load(Pictures(), images, batch=40)))
    xs = images.unpack(batch["image"])
    assert batch["image"].dtype == jnp.uint8 and xs.shape == (40, 4, 5, 1)
    np.testing.assert_allclose(xs.min((1, 2, 3)) * 255, batch["label"], atol=1e-4)
    flipped = int((xs[:, 0, 0, 0] > xs[:, 0, 4, 0]).sum())
    assert 8 < flipped < 32
    moved = next(iter(load(Pictures(), Images(pad=2), batch=40)))["image"]
    assert moved.shape == (40, 4, 5, 1) and (np.asarray(moved) == 0).any()


def test_wrong_calls_are_errors():
    with pytest.raises(ValueError, match="batch is 41, but a shard has 40 of 40 samples"):
        load(SOURCE, AS_THEY_ARE, batch=41)
    with pytest.raises(ValueError, match="shard must be"):
        load(SOURCE, AS_THEY_ARE, batch=1, shard=(2, 2))
    for name, value in [("batch", 0), ("batch", -1), ("epochs", -1), ("epochs", 0), ("start", -1), ("workers", -1)]:
        with pytest.raises(ValueError, match=f"{name} must be at least [01]; got {value}"):
            load(SOURCE, AS_THEY_ARE, **{"batch": 8} | {name: value})
    with pytest.raises(ValueError, match="source must have at least one sample"):
        load([], AS_THEY_ARE, batch=1, drop_remainder=False)
    with pytest.raises(ValueError, match=r"shard \(1, 2\) has none of the 1 samples"):
        load([SOURCE[0]], AS_THEY_ARE, batch=1, drop_remainder=False, shard=(1, 2))
    with pytest.raises(ValueError, match="store must be"):
        Frames(SENSOR, T=2, store="floats")


def multiset(events) -> Counter:
    return Counter(zip(*(events[c].tolist() for c in "txyp"), strict=True))


def test_augmentations_move_or_drop_events_and_invent_none():
    events = SOURCE[30]["events"]
    before, rng = {c: v.copy() for c, v in events.items()}, np.random.default_rng(0)
    assert multiset(au.flip(au.flip(events, SENSOR), SENSOR)) == multiset(events) != multiset(au.flip(events, SENSOR))
    moved = au.shift(events, SENSOR, 2, -1)
    inside = (events["x"] < 7) & (events["y"] >= 1)
    assert 0 < inside.sum() < len(inside)
    assert np.array_equal(moved["x"], events["x"][inside] + 2) and np.array_equal(moved["y"], events["y"][inside] - 1)
    cut = au.crop(events, 3, 4, 2, 5)
    inside = (events["y"] >= 2) & (events["y"] < 5) & (events["x"] >= 5)
    assert np.array_equal(cut["t"], events["t"][inside]) and cut["x"].max() <= 3 and cut["y"].max() <= 2
    shaken = au.jitter(events, rng, 500.0)
    assert Counter(zip(shaken["x"].tolist(), shaken["y"].tolist(), shaken["p"].tolist(), strict=True)) == Counter(
        zip(events["x"].tolist(), events["y"].tolist(), events["p"].tolist(), strict=True)
    )
    assert np.all(np.diff(shaken["t"].astype(int)) >= 0) and not np.array_equal(shaken["t"], events["t"])
    fewer = au.drop(events, rng, 0.4)
    assert not multiset(fewer) - multiset(events) and 0.3 < len(fewer["t"]) / len(events["t"]) < 0.9
    assert len(au.drop(events, rng, 1.0)["t"]) == 1
    for result in (moved, cut, shaken, fewer):
        ev.check(result, SENSOR, "augmented")
    assert all(np.array_equal(events[c], before[c]) for c in "txyp")


def test_a_crop_changes_the_sensor_and_is_never_empty():
    corner = {c: np.array([v]) for c, v in {"t": 0, "x": 8, "y": 5, "p": 1}.items()}
    augment = au.Augment(crop=(2, 3))
    assert augment.sensor(SENSOR) == ev.Sensor(2, 3)
    for seed in range(20):
        cut = augment(corner, SENSOR, np.random.default_rng(seed))
        ev.check(cut, ev.Sensor(2, 3), "cropped")
    frames = Frames(SENSOR, T=2, augment=augment)
    batch = next(iter(load(SOURCE, frames, batch=4)))
    assert frames.unpack(batch["frames"]).shape == (2, 4, 2, 3, 2)
    assert pk.pack_bits(np.ones((2, 12))).shape == batch["frames"].shape[::2]


def test_starting_does_not_print_the_source():
    """Grain prints its transforms when it starts; for images in memory that took longer than an epoch."""

    class Silent(Recordings):
        def __repr__(self):
            raise AssertionError("printed")

    assert len(next(iter(load(Silent(), AS_THEY_ARE, batch=4)))["label"]) == 4
