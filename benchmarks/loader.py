"""Does the loader keep the device busy? A training step on batches that are on the device, beside the same step with the loader.

    python benchmarks/loader.py        Spiking-ResNet-18, T=32, B=100; rows go to results/loader.jsonl

`fed_over_resident` is the cost of the loader; at most 1.03 is wanted. Samples are random and stay in memory. Both
measurements alternate. What the loader prepared in advance is used up before the clock starts.

resnet18_images         bytes of the shape of CIFAR-10; the device makes spikes of them in both
resnet18_host_spikes    bytes of the shape of MNIST, in three channels; if fed, the host makes the spikes and sends them all, as the
                        temporal fusion paper does. 600 steps are an epoch of MNIST
"""

import itertools
import statistics
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from runner import Case, main, question
from with_jax import resnet, training_step

from snnfuse.data import encoders
from snnfuse.data.loader import Images, load

HOW = dict(workers=8, threads=4, ahead=4, steps=40, rounds=3, samples=20_000)  # threads in each worker, batches ahead


@question("loader")
def loader(args):
    T, batch = (2, 4) if args.tiny else (32, 100)
    how = HOW | (dict(workers=0, threads=1, steps=2, rounds=2, samples=40) if args.tiny else {})
    for case, shape in (("images", (32, 32, 3)), ("host_spikes", (28, 28, 1))):
        key = dict(case=f"resnet18_{case}_T{T}_B{batch}", source="memory", T=T, B=batch, steps=how["steps"])
        yield Case(key, measure, (T, batch, shape, "scan" if args.tiny else None, how))


@dataclass(frozen=True)
class Spikes(Images):
    """Spikes [T, H, W, 3] of a grey image, made on the host."""

    T: int = 32

    def __call__(self, sample, rng):
        image = sample["image"] / np.float32(255)
        spikes = rng.random((self.T, *image.shape[:2], 3), np.float32) < image
        return {"image": spikes.astype(np.uint8), "label": np.int32(sample["label"])}


def measure(T, batch, shape, implementation, how):
    example, noise = Images(flip=0.5, pad=4), jax.random.key(0)
    encode = lambda xs, i: encoders.bernoulli(
        jax.random.fold_in(noise, i), jnp.tile(example.unpack(xs), 3 // shape[-1]), T
    )
    step = fed_step = training_step(resnet(implementation, 18, "bfloat16"), prepare=encode)
    fed_example, samples = example, Samples(how["samples"], shape)
    if shape[-1] == 1:
        fed_example, swap = Spikes(T=T), lambda xs, i: jnp.moveaxis(xs, 1, 0).astype(jnp.float32)
        fed_step = training_step(resnet(implementation, 18, "bfloat16"), prepare=swap)

    def run(step, batches, count):
        start = time.perf_counter()
        for batch in itertools.islice(batches, count):
            metrics = step(batch["image"], batch["label"])
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / count * 1e3

    options = {k: how[k] for k in ("workers", "threads", "ahead")}
    fed = iter(load(samples, fed_example, batch=batch, seed=0, **options))
    kept = list(itertools.islice(iter(load(samples, example, batch=batch, seed=0)), 8))
    resident, times = itertools.cycle(kept), {"resident": [], "fed": []}
    run(step, resident, 5)  # compiles
    run(fed_step, fed, 5)
    for _ in range(how["rounds"]):
        times["resident"].append(run(step, resident, how["steps"]))
        run(fed_step, fed, min(20, how["steps"]))  # uses up what was prepared in the meantime
        times["fed"].append(run(fed_step, fed, how["steps"]))
    bytes_per_batch = sum(x.nbytes for x in next(fed).values())
    here, there = map(statistics.median, times.values())
    row = how | dict(bytes_per_batch=bytes_per_batch, all_ms=times)
    return row | dict(resident_ms=here, fed_ms=there, fed_over_resident=there / here)


class Samples:
    """`size` samples of that shape in memory, of which 1,000 differ."""

    def __init__(self, size, shape):
        self.size, self.images = size, np.random.default_rng(0).integers(0, 256, (1000, *shape), np.uint8)

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"image": self.images[i % 1000], "label": i % 10}


if __name__ == "__main__":
    main(__doc__, "loader")
