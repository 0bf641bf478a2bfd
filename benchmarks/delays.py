"""Do learned delays and recurrent connections help on spoken digits of a speaker who was never heard?

    python benchmarks/delays.py                              72 trainings; rows go to results/delays.jsonl
    python benchmarks/delays.py --only "theo held out" --seeds 1 --steps 300        less, for a CPU
    python benchmarks/delays.py delay_layers                 a minute; rows go to results/delay_layers.jsonl
    python benchmarks/delays.py --write bands.npz            only writes the input, 3 MB, rounded, for a machine without the recordings

The network is that of experiments/spoken_digits.py: two dense layers of adaptive LIF neurons, on mel bands of 39 steps. Each of
six speakers is held out in turn, with 500 recordings; training takes the 2,500 of the others, shifted by up to one step. "delays" gives each
synapse a learned delay of up to `--longest` steps, `nn.DelayedLinear`; "recurrence" connects each layer to itself, `nn.Recurrent`. A row
is one training: all steps run in one call. `python -m snnfuse.data list` says how to get the recordings.

"delay_layers" compares ways to compute the two layers, forward and backward, on random spikes: `nn.Delay` as a sum of shifted inputs or
as a depthwise convolution, `nn.DelayedLinear` as a convolution along time, as one product with all delays side by side, or as a
product for each delay. "a product without delays" is `xs @ kernel`.
"""

import sys
import time
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from runner import HERE, Case, job, main, question
from with_jax import bf16, cross_entropy, device_time, f32, forward_backward

from snnfuse import nn

sys.path.insert(0, str(HERE.parent / "experiments"))
NETWORKS = {"neither": (False, False), "delays": (True, False), "recurrence": (False, True), "both": (True, True)}
SPEAKERS = ("theo", "george", "nicolas", "jackson", "lucas", "yweweler")
B, T, BANDS = 64, 39, 40
LEVELS = 63  # of a mel band between 0 and 1, so that the file that --write makes is small


@question(
    "delays",
    gpu=False,
    steps=(800, "training steps"),
    seeds=(3, "trainings of each network and speaker"),
    hidden=(256, "neurons of each layer"),
    longest=(10, "the longest delay, in steps"),
    bands=("", "a file that --write made, in place of the recordings"),
    write=("", "write the input to this file and train nothing"),
)
def delays(args):
    if args.write:
        return np.savez_compressed(args.write, **from_recordings())
    steps, hidden, seeds = (3, 8, 1) if args.tiny else (args.steps, args.hidden, args.seeds)
    for seed in range(seeds):
        for speaker in SPEAKERS[:1] if args.tiny else SPEAKERS:
            for network in NETWORKS:
                case = f"{network}, {speaker} held out"
                kind = "triton" if jax.default_backend() == "gpu" else "scan"
                key = dict(case=case, implementation=kind, T=T, B=B, size=hidden, steps=steps, seed=seed)
                where = "random" if args.tiny else args.bands
                yield Case(key, train, (network, speaker, kind, hidden, args.longest, steps, seed, where))


def from_recordings():
    """The mel bands of all recordings in 63 levels, their digits and their speakers."""
    from inputs import DATASETS

    data = DATASETS["spoken_digits"]
    every = [sample for source in data.sources() for sample in source]
    sound = data.example()
    audio = np.stack([sound(sample, None)["audio"] for sample in every])
    bands = jax.jit(lambda audio: data.encode(None, {"audio": audio}, T))
    xs = np.concatenate([np.asarray(bands(audio[i : i + 500])) for i in range(0, len(audio), 500)], axis=1)
    xs = np.round(xs * LEVELS).astype(np.int8)
    return dict(xs=xs, labels=[int(s["label"]) for s in every], speakers=[s["speaker"].decode() for s in every])


@cache
def recordings(where):
    """(bands [T, recordings, BANDS], labels, names of the speakers)."""
    if where == "random":
        xs = np.random.default_rng(0).integers(0, LEVELS, (T, 80, BANDS))
        made = dict(xs=xs, labels=np.arange(80) % 10, speakers=["theo", "jackson"] * 40)
    else:
        made = np.load(where) if where else from_recordings()
    return made["xs"] / np.float32(LEVELS), np.asarray(made["labels"], np.int32), np.asarray(made["speakers"])


@cache
def program(network, kind, hidden, longest, steps, count, held):
    """A compiled function that trains on `count` recordings and returns (accuracy on `held` others, the mean of the last 50 losses)."""
    import models

    delayed, recurrent = NETWORKS[network]
    config = replace(models.MODELS["recurrent"], hidden=(hidden, hidden), recurrent=recurrent, implementation=kind)
    config = replace(config, max_delay=longest if delayed else 0)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, max(1, steps // 10), steps)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2))

    def run(key, xs, labels, test_xs, test_labels):
        model = config.build((BANDS,), 10, nnx.Rngs(key))
        optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)
        graphdef, state = nnx.split((model, optimizer))

        def step(state, i):
            model, optimizer = nnx.merge(graphdef, state)
            models.prepare(config, model, i / steps)
            chosen, moved = jax.random.split(jax.random.fold_in(key, i))
            place = jax.random.randint(chosen, (B,), 0, count)
            by = jax.random.randint(moved, (B,), -1, 2)
            batch = jax.vmap(lambda x, by: jnp.roll(x, by, 0), (1, 0), 1)(xs[:, place], by)
            loss = lambda model: cross_entropy(nn.membrane_mean(model(batch)[0]), labels[place])
            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return nnx.state((model, optimizer)), value

        state, losses = lax.scan(step, state, jnp.arange(steps))
        model, _ = nnx.merge(graphdef, state)
        model.eval()
        right = nn.membrane_mean(model(test_xs)[0]).argmax(-1) == test_labels
        return right.mean(), losses[-50:].mean()

    shape = lambda n: (jax.ShapeDtypeStruct((T, n, BANDS), f32), jax.ShapeDtypeStruct((n,), jnp.int32))
    return jax.jit(run).lower(jax.random.key(0), *shape(count), *shape(held)).compile()


def train(network, speaker, kind, hidden, longest, steps, seed, where):
    xs, labels, speakers = recordings(where)
    held = speakers == speaker
    trained = program(network, kind, hidden, longest, steps, int((~held).sum()), int(held.sum()))
    start = time.perf_counter()
    found = trained(jax.random.key(seed), xs[:, ~held], labels[~held], xs[:, held], labels[held])
    accuracy, loss = map(float, found)
    return dict(held_out_accuracy=accuracy, final_loss=loss, seconds=time.perf_counter() - start, longest=longest)


def shifted_sums(window, taps):
    wide, D, steps = window.astype(f32), len(taps) - 1, len(window) - len(taps) + 1
    return sum(taps[k] * wide[D - k : D - k + steps] for k in range(D + 1)).astype(window.dtype)


def depthwise_convolution(window, taps):
    kernel = taps[::-1][:, None].astype(window.dtype)
    options = dict(dimension_numbers=ALONG_TIME, feature_group_count=window.shape[-1])
    return lax.conv_general_dilated(window, kernel, (1,), "VALID", **options)


def convolution(window, kernel):
    kernel = kernel[::-1].astype(window.dtype)
    return lax.conv_general_dilated(window, kernel, (1,), "VALID", dimension_numbers=ALONG_TIME)


def side_by_side(window, kernel):
    D, steps = len(kernel) - 1, len(window) - len(kernel) + 1
    wide = jnp.concatenate([window[D - k : D - k + steps] for k in range(D + 1)], -1)
    return wide @ kernel.reshape(-1, kernel.shape[-1]).astype(window.dtype)


def product_for_each(window, kernel):
    D, steps = len(kernel) - 1, len(window) - len(kernel) + 1

    def add(total, now):
        k, weights = now
        late = lax.dynamic_slice_in_dim(window, D - k, steps)
        return total + jnp.dot(late, weights.astype(late.dtype), preferred_element_type=f32), None

    zero = jnp.zeros((steps, *window.shape[1:-1], kernel.shape[-1]), f32)
    return lax.scan(add, zero, (jnp.arange(D + 1), kernel))[0].astype(window.dtype)


def without_delays(window, kernel):
    return window[len(kernel) - 1 :] @ kernel[0].astype(window.dtype)


ALONG_TIME = lax.ConvDimensionNumbers((1, 2, 0), (2, 1, 0), (1, 2, 0))
WAYS = {
    "Delay": (shifted_sums, depthwise_convolution),
    "DelayedLinear": (convolution, side_by_side, product_for_each, without_delays),
}


@question("delay_layers")
def delay_layers(args):
    for longest in (3,) if args.tiny else (10, 25):
        for layer, ways in WAYS.items():
            for dtype in (f32, bf16):
                for way in ways:
                    shape = (8, 4, 16) if args.tiny else (100, 256, 256)
                    words = way.__name__.replace("_", " ")
                    key = dict(case=layer, implementation=words, T=shape[0], B=shape[1], size=shape[2], steps=longest)
                    key |= dict(dtype=jnp.dtype(dtype).name)
                    yield Case(key, time_layer, (way, layer, longest, shape, dtype), job(args))


def time_layer(way, layer, longest, shape, dtype):
    steps, batch, N = shape
    of_weights, of_inputs, of_outs = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(of_weights, (longest + 1, N) + (N,) * (layer == "DelayedLinear"))

    def draw(i):
        xs = jax.random.bernoulli(jax.random.fold_in(of_inputs, i), 0.1, (longest + steps, batch, N)).astype(dtype)
        return (xs, weights), jax.random.normal(jax.random.fold_in(of_outs, i), (steps, batch, N)).astype(dtype)

    yield from device_time(forward_backward(way), draw, 3)


if __name__ == "__main__":
    main(__doc__, "delays", "delay_layers")
