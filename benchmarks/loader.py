"""Does the loader keep the device busy? A training step on batches that are already there, against the same step fed.

    python benchmarks/loader.py                                  Spiking-ResNet-18 on CIFAR-shaped bytes, T=32, B=100
    python benchmarks/loader.py --data events --workers 8        the same on 34 x 34 x 2 events, as bits
    python benchmarks/loader.py --model my_module:build          any model: build(rngs, channels, classes), [T, B, H, W, C] -> [T, B, classes]

Prints one JSON row and appends it to results/loader.jsonl: `fed_over_resident` is what the loader costs (at most 1.03
wanted; 1.003 on an H100 with --source memory, from disk not measured). Samples are random, stored as in a prepared data set
(array_record, read by tfds) with --source disk, or made beforehand and kept in memory, without tfds, with --source memory.
Both measurements alternate, and the loader's head start is spent before the clock starts.

It needs grain, and with --source disk tensorflow-datasets. On a machine that reaches no package index carry a folder made
with the same Python by `pip install --no-deps --target DIR ...`, and put it on PYTHONPATH: grain array-record portpicker
cloudpickle (16 MB), and for tfds tensorflow-datasets dm-tree immutabledict promise simple-parsing docstring-parser
tensorflow-metadata termcolor toml wrapt requests importlib-resources six attrs googleapis-common-protos (44 MB). Besides
those only what comes with flax and orbax is used: absl-py, etils, fsspec, protobuf, psutil, prometheus-client, zipp.
"""

import argparse
import importlib
import statistics
import tempfile
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from measure import record

from snnfuse import models, nn
from snnfuse.data import encoders
from snnfuse.data.events import Sensor
from snnfuse.data.loader import Frames, Images, load

SENSOR = Sensor(34, 34)


def resnet18(rngs, channels, classes):
    return models.spiking_resnet(18, channels, classes, policy="bfloat16", rngs=rngs)


def small(rngs, channels, classes):
    conv = partial(nnx.Conv, kernel_size=(3, 3), strides=2, rngs=rngs)
    pool = lambda x: x.mean((-3, -2))
    return nn.Sequential(
        conv(channels, 8), nn.LIF(tau=2.0), conv(8, 16), nn.LIF(tau=2.0), pool, nnx.Linear(16, classes, rngs=rngs)
    )


MODELS = {"resnet18": resnet18, "small": small}


def samples(data: str, count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    if data == "images":
        return [{"image": rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), "label": i % 10} for i in range(count)]
    made = []
    for i in range(count):
        n = int(rng.integers(3000, 5500))  # as N-MNIST
        events = {"t": np.sort(rng.integers(0, 300_000, n)).astype(np.uint32), "p": rng.integers(0, 2, n).astype(bool)}
        events |= {axis: rng.integers(0, 34, n).astype(np.uint8) for axis in "xy"}
        made.append({"events": events, "label": i % 10})
    return made


class Memory:
    """Samples in memory, repeated to `size`."""

    def __init__(self, kept: list[dict], size: int):
        self.kept, self.size = kept, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return self.kept[int(i) % len(self.kept)]


def on_disk(kept: list[dict], size: int, folder: str):
    """The same as a prepared data set."""
    from snnfuse.data.builders import base, images, streaming

    class Random(base.EventSet if "events" in kept[0] else images.ImageSet):
        name, SENSOR, LABELS, SHAPE = "random", SENSOR, 10, (32, 32, 3)

        def jobs(self, paths, stack):
            return {"train": [lambda i=i: [(str(i), kept[i % len(kept)])] for i in range(size)]}

    made = streaming.builder(Random, data_dir=folder)
    made.download_and_prepare()
    return made.as_data_source(split="train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--data", choices=("images", "events"), default="images")
    parser.add_argument("--source", choices=("disk", "memory"), default="disk")
    for name, value in dict(
        T=32, batch=100, workers=8, threads=4, ahead=4, steps=200, rounds=5, samples=20_000
    ).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()

    T = options.T
    example = Images(flip=0.5, pad=4) if options.data == "images" else Frames(SENSOR, T=T, split="time")
    field, channels = ("image", 3) if options.data == "images" else ("frames", 2)
    module, _, function = options.model.partition(":")
    build = getattr(importlib.import_module(module), function) if function else MODELS[options.model]
    model = build(nnx.Rngs(0), channels, 10)
    graphdef, state = nnx.split((model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)))
    state, tree = jax.tree.flatten(state)

    @partial(jax.jit, donate_argnums=0)
    def step(state, inputs, labels, number):
        model, optimizer = nnx.merge(graphdef, tree.unflatten(state))
        xs = example.unpack(inputs)
        if options.data == "images":
            xs = encoders.bernoulli(jax.random.fold_in(jax.random.key(0), number), xs, T)

        def loss(model):
            logits = model(xs)[0].astype(jnp.float32).mean(0)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return jax.tree.leaves(nnx.state((model, optimizer))), value

    def run(state, next_batch, steps):
        start = time.perf_counter()
        for number in range(steps):
            batch = next_batch()
            state, value = step(state, batch[field], batch["label"], number)
        jax.block_until_ready(value)
        return state, (time.perf_counter() - start) / steps * 1e3

    with tempfile.TemporaryDirectory() as folder:
        kept = samples(options.data, min(1000, options.samples))
        source = Memory(kept, options.samples) if options.source == "memory" else on_disk(kept, options.samples, folder)
        settings = dict(workers=options.workers, threads=options.threads, ahead=options.ahead)
        fed = iter(load(source, example, batch=options.batch, seed=0, **settings))
        resident = [next(fed) for _ in range(8)]
        turn = iter(range(10**9))
        here = lambda: resident[next(turn) % len(resident)]
        there = lambda: next(fed)
        state, _ = run(state, here, 5)  # compiles
        times = {"resident": [], "fed": []}
        for _ in range(options.rounds):
            state, ms = run(state, here, options.steps)
            times["resident"].append(ms)
            state, _ = run(state, there, 20)  # what was fetched ahead in the meantime
            state, ms = run(state, there, options.steps)
            times["fed"].append(ms)
        fed.close()  # and its workers
    middle = {name: statistics.median(values) for name, values in times.items()}
    record(
        "loader",
        case=f"{options.model}_{options.data}_T{T}_B{options.batch}",
        **vars(options),
        bytes_per_batch=sum(x.nbytes for x in resident[0].values()),
        resident_ms=middle["resident"],
        fed_ms=middle["fed"],
        fed_over_resident=middle["fed"] / middle["resident"],
        all_ms=times,
        status="ok",
    )


if __name__ == "__main__":
    main()
