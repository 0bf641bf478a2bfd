"""Does the loader keep the device busy? A training step on batches that are on the device, beside the same step with the loader.

    python benchmarks/loader.py        Spiking-ResNet-18 on CIFAR-shaped bytes, T=32, B=100; rows go to results/loader.jsonl

`fed_over_resident` is the cost of the loader; at most 1.03 is wanted. Samples are random and stay in memory. Both
measurements alternate. What the loader prepared in advance is used up before the clock starts.
"""

import itertools
import statistics
import time

import jax
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
    key = dict(case=f"resnet18_images_T{T}_B{batch}", source="memory", T=T, B=batch, steps=how["steps"])
    yield Case(key, measure, (T, batch, "scan" if args.tiny else None, how))


def measure(T, batch, implementation, how):
    example, noise = Images(flip=0.5, pad=4), jax.random.key(0)
    prepare = lambda xs, i: encoders.bernoulli(jax.random.fold_in(noise, i), example.unpack(xs), T)
    step = training_step(resnet(implementation, 18, "bfloat16"), prepare=prepare)

    def run(batches, count):
        start = time.perf_counter()
        for batch in itertools.islice(batches, count):
            metrics = step(batch["image"], batch["label"])
        jax.block_until_ready(metrics)
        return (time.perf_counter() - start) / count * 1e3

    options = {k: how[k] for k in ("workers", "threads", "ahead")}
    fed = iter(load(Samples(how["samples"]), example, batch=batch, seed=0, **options))
    kept = list(itertools.islice(fed, 8))
    resident, times = itertools.cycle(kept), {"resident": [], "fed": []}
    run(resident, 5)  # compiles
    for _ in range(how["rounds"]):
        times["resident"].append(run(resident, how["steps"]))
        run(fed, min(20, how["steps"]))  # uses up what was prepared in the meantime
        times["fed"].append(run(fed, how["steps"]))
    here, there = map(statistics.median, times.values())
    row = how | dict(bytes_per_batch=sum(x.nbytes for x in kept[0].values()), all_ms=times)
    return row | dict(resident_ms=here, fed_ms=there, fed_over_resident=there / here)


class Samples:
    """`size` samples in memory, of which 1,000 differ."""

    def __init__(self, size):
        self.size, self.images = size, np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), np.uint8)

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"image": self.images[i % 1000], "label": i % 10}


if __name__ == "__main__":
    main(__doc__, "loader")
