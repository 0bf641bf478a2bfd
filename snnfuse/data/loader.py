"""The loader: a Grain pipeline from a source to batches on the device. It resumes exactly where it stopped.

    batches = load(source, Frames(sensor, T=16), batch=100, seed=0, workers=2)
    iterator = iter(batches)
    batch = next(iterator)                    # on the device, packed
    xs = frames.unpack(batch["frames"])       # inside the jitted step: [T, B, H, W, P]
    position = iterator.get_state()           # a dict for JSON: save it; iterator.set_state(position) resumes

Batch number k depends on the seed and on k alone. The number of workers and threads changes only the speed. So
`load(..., start=k)` also begins at batch k. If workers > 0, protect the program with `if __name__ == "__main__"`, because
each worker is a new process that imports it.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from snnfuse.data import events as ev
from snnfuse.data.examples import Example, Frames, Images, PackedFrames, Signals, Sound  # noqa: F401
from snnfuse.data.optional import require


def read(source: Sequence[dict], indices: Sequence[int]) -> list[dict]:
    """Those samples of `source`. Prepared data sets read many at a time, in half of the time of one by one."""
    many = getattr(source, "__getitems__", None)
    return [source[i] for i in indices] if many is None else many(list(indices))


def pieces(
    source: Sequence[dict],
    example: Example,
    *,
    batch: int,
    length: int,
    along: Sequence[str],
    seed: int = 0,
    shuffle: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """Long recordings cut into consecutive pieces, one epoch: row b of a batch goes on where row b of the batch before ended.

    A batch has, in NumPy:

        the arrays in `along`     [length, B, ...], time first
        the others                [B, ...], the same in each piece of a recording
        begins                    bool [B], where a recording begins: the state must be the first one there
        length                    [B], how many of the steps are real; zeros follow the end of a recording

    `online.gradients(..., begins=batch["begins"][None], length=length)` starts the state anew where a recording begins. The epoch ends
    when a row has no recording left.

    Args:
      source: samples by index. Each row takes the next recording in an order that `seed` draws.
      example: example(sample, rng) gives arrays by name; those in `along` have time as their first axis, of any length.
    """
    batch, length = ev.at_least("batch", batch, 1), ev.at_least("length", length, 1)
    _at_least(0, seed=seed)
    if isinstance(along, str) or not along:
        raise ValueError(f"along must be the names of one array or several; got {along!r}")
    if batch > len(source):
        raise ValueError(f"batch must be at most the number of recordings, {len(source)}; got {batch}")
    order, rows = iter(_order(len(source), seed, 0, shuffle)), [None] * batch
    while True:
        taken = []
        for b, row in enumerate(rows):
            if row is None:
                index = next(order, None)
                if index is None:
                    return
                made = example(source[int(index)], np.random.default_rng((seed, int(index))))
                sizes = {len(made[name]) if name in made else 0 for name in along}
                if len(sizes) != 1 or 0 in sizes:
                    raise ValueError(
                        f"along must name arrays of one length above 0 of sample {index}; got {tuple(along)}"
                    )
                row = made, 0
            made, start = row
            steps = min(length, len(made[along[0]]) - start)
            pad = lambda x, steps=steps: np.pad(x, [(0, length - steps), *[(0, 0)] * (x.ndim - 1)])
            piece = {n: pad(x[start : start + steps]) if n in along else np.asarray(x) for n, x in made.items()}
            taken.append(piece | dict(begins=np.bool_(start == 0), length=np.int32(steps)))
            rows[b] = None if start + steps == len(made[along[0]]) else (made, start + steps)
        yield {name: np.stack([piece[name] for piece in taken], int(name in along)) for name in taken[0]}


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count) if shuffle else np.arange(count)


@dataclass(frozen=True, repr=False)  # Grain prints it when it starts, and the source may hold a data set
class _Fetch:
    """From a batch's number to the batch. Whole batches, because Grain and tfds spend more on an element than an image needs."""

    source: Sequence[dict]
    example: Example
    batch: int
    seed: int
    shuffle: bool
    used: int  # samples in an epoch, over all shards
    shard: tuple[int, int]
    batches: int  # in an epoch of this shard

    def __call__(self, number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        epoch, at = divmod(int(number), self.batches)
        mine = _order(len(self.source), self.seed, epoch, self.shuffle)[: self.used][self.shard[0] :: self.shard[1]]
        indices = mine[at * self.batch : (at + 1) * self.batch].tolist()
        samples = [self._example(i, sample, rng) for i, sample in zip(indices, read(self.source, indices), strict=True)]
        axes = getattr(self.example, "axes", {})
        return {name: np.stack([sample[name] for sample in samples], axes.get(name, 0)) for name in samples[0]}

    def _example(self, index: int, sample: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        try:
            return self.example(sample, rng)
        except ev.BadSample as fault:
            raise fault.renamed(f"sample {index}") from None


@dataclass(frozen=True)
class Batches:
    """What `load` returns: iterate over it. `per_epoch` is the number of batches in an epoch of this shard."""

    per_epoch: int
    start: int
    data: dict[str, Any]  # what the order of the samples depends on, compared when a position is restored
    pipeline: Callable[[int], Any]  # from the number of its first batch to a grain IterDataset

    def __iter__(self) -> "Position":
        return Position(self)


class Position(Iterator[dict[str, Any]]):
    """An iterator over batches that can say where it is, and go there again."""

    def __init__(self, batches: Batches):
        self._batches, self._number, self._running = batches, batches.start, None

    def __next__(self) -> dict[str, Any]:
        if self._running is None:
            self._running = iter(self._batches.pipeline(self._number))
            weakref.finalize(self, self._running.close)  # else its threads complain when Python exits
        batch = next(self._running)
        self._number += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch, and what it depends on."""
        return {"next_batch": self._number, **self._batches.data}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position. Raises ValueError if it comes from a loader that gives other samples."""
        expected = {"next_batch", *self._batches.data}
        if state.keys() != expected:
            raise ValueError(f"position must have the keys {sorted(expected)}; got {sorted(state)}")
        for name, ours in self._batches.data.items():
            theirs = tuple(state[name]) if isinstance(state[name], list) else state[name]
            if theirs != ours:
                raise ValueError(
                    f"position was saved by a loader with {name}={theirs}, but this one has {name}={ours}: "
                    "it would continue with other samples"
                )
        self._number, self._running = int(state["next_batch"]), None


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def load(
    source: Sequence[dict],
    example: Example,
    *,
    batch: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    start: int = 0,
    drop_remainder: bool = True,
    shard: tuple[int, int] | None = None,
    workers: int = 0,
    threads: int = 4,
    ahead: int = 2,
    device: Any = None,
) -> Batches:
    """Batches of `example(sample, rng)`, on the device.

    Args:
      source: samples by index: `source[i]`, `len(source)`. Workers need one that pickles.
      epochs: how many; None never ends. Every epoch has its own order.
      start: the number of the first batch; earlier ones are not read.
      drop_remainder: leave out the last samples of an epoch that fill no batch. All shards then have equally many batches.
      shard: (this process, the number of processes), by default JAX's own. Shards have different samples.
      workers: processes that read; 0 reads in this one. `threads` read in each of them.
      ahead: batches that wait on the device.
      device: a jax.Device, or a Sharding of a batch. None is the default device. False leaves batches in NumPy.
    """
    grain = require("grain")
    index, count = shard or (jax.process_index(), jax.process_count())
    if not 0 <= index < count:
        raise ValueError(f"shard must be (i, n) with 0 <= i < n; got {(index, count)}")
    _at_least(1, batch=batch, epochs=epochs, threads=threads, ahead=ahead)
    _at_least(0, seed=seed, start=start, workers=workers)
    if not len(source):
        raise ValueError("source must have at least one sample; got 0")
    if drop_remainder and len(source) // count < batch:
        raise ValueError(f"batch is {batch}, but a shard has {len(source) // count} of {len(source)} samples")
    used = len(source) // count * count if drop_remainder else len(source)
    mine = len(range(index, used, count))
    if not mine:
        raise ValueError(f"shard {(index, count)} has none of the {len(source)} samples")
    each = mine // batch if drop_remainder else -(-mine // batch)
    fetch = _Fetch(source, example, batch, seed, shuffle, used, (index, count), each)
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)

    def pipeline(first):
        numbers = grain.MapDataset.range(each * (2**31 if epochs is None else epochs)).seed(seed)
        batches = numbers.random_map(fetch)[first:].to_iter_dataset(reading)
        if workers:
            flags = require("absl.flags").FLAGS
            if not flags.is_parsed():  # grain hands its flags to its workers, also in a program that has none
                flags.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options)
        if device is False:
            return batches
        place = jax.local_devices()[0] if device is None else device
        return require("grain.experimental").device_put(batches, place, cpu_buffer_size=ahead, device_buffer_size=ahead)

    data = {"samples": len(source), "batch": batch, "seed": seed, "shuffle": shuffle, "shard": (index, count)}
    return Batches(each, start, data | {"drop_remainder": drop_remainder}, pipeline)
