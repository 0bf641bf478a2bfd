"""How much memory and time does a training step need when T grows, whole and in pieces? How soon is a streamed decision there?

    python benchmarks/long_sequences.py              on a GPU; 4 minutes on an H100; rows go to results/long_sequences.jsonl
    python benchmarks/long_sequences.py --only "gradients.*scan"   also on a CPU, a few minutes
    python benchmarks/long_sequences.py streaming    1 minute; rows go to results/streaming.jsonl
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.97 XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" \
        python benchmarks/long_sequences.py --only whole     the largest T that fits into all memory; cuBLAS chooses the products

"whole" is backpropagation through all T steps at once; "pieces of 500" is `nn.Pieces`, which recomputes one piece at a time.
The case "dense" is the network 700-256-256-20 with a batch of 32; "convolutional" has two convolutions on events of 64 x 64
pixels, half of those of DVS128 Gesture each way, and a batch of 16. A step is forward, backward and Adam. Inputs are random and stored as
int8. Rows "gradients" compare the two at T = 1,000: `flips` are spikes of the last hidden layer that differ, and `gradient_error` is the
largest difference of a gradient, over the largest gradient of its array. The weights are multiples of 1/1024, so that the products of
both are exact, and a difference is a fault or the order of the sums over time.

"streaming" measures `nn.Stream` on the same networks with a batch of 1: `call_ms` is the time from K steps of input in a NumPy array
to the class as a Python number, the median of many calls one after another; `late_ms` is its 99th percentile. "nnx.jit" is
the same call without `nn.Stream`.
"""

import itertools
import os
from math import sqrt

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from runner import Case, each_ms, main, question
from with_jax import cross_entropy, f32, largest_error, time_step, training_step

from snnfuse import nn

RATE = 0.05  # of the input spikes
LENGTH = dict(dense=500, convolutional=50)  # the steps of a piece
BATCH = dict(dense=32, convolutional=16)


@question("long_sequences", gpu=False)
def long_sequences(args):
    kind = "scan" if args.tiny else "triton"
    runs = [("dense", 12, "pieces"), ("convolutional", 12, "pieces")]
    if not args.tiny:
        runs = [("dense", T, how) for T in (1_000, 10_000, 100_000) for how in ("whole", "pieces")]
        runs += [("convolutional", 1_000, how) for how in ("whole", "pieces")]
        runs += [("dense", 10_000, "scan"), ("dense", 1_000_000, "pieces")]
        most = (350_000, 500_000, 700_000, 750_000)  # on an H100 and on an H200
        runs += [("dense", T, "whole") for T in most]
    for case, T, how in runs:
        length = (5 if args.tiny else LENGTH[case]) if how == "pieces" else None
        named = dict(case=case, implementation="scan" if how == "scan" else kind, dtype="float32", T=T)
        key = named | dict(memory=f"pieces of {length}" if length else "whole", B=4 if args.tiny else BATCH[case])
        if "autotune_level=0" in os.environ.get("XLA_FLAGS", ""):
            key |= dict(note="without autotuning")  # which takes minutes with the largest arrays
        options = case, key["implementation"], T, key["B"], length, args.tiny
        yield Case(key, measure, options, "fresh")
        if length and T <= 1_000:
            yield Case(key | dict(case=f"gradients, {case}"), compare, options, "fresh")
    if not args.tiny:
        key = dict(case="gradients, convolutional", implementation="scan", dtype="float32", T=1_000)
        key |= dict(memory="pieces of 50", B=1)
        yield Case(key, compare, ("convolutional", "scan", 1_000, 1, 50, False), "fresh")


def measure(case, implementation, T, B, length, tiny):
    xs, labels = spikes(T, B, case, tiny), jnp.arange(B) % 10
    step = training_step(network(case, implementation, length, tiny))
    return dict(inputs_mb=xs.nbytes / 1e6) | time_step(step, [(xs, labels)])


def network(case, implementation, length, tiny, kind=nn.Sequential):
    options = dict(kernel_init=grid, rngs=nnx.Rngs(0))
    lif = lambda: nn.LIF(tau=20.0, implementation=implementation)
    layers = [lambda xs: xs.astype(f32)]
    if case == "dense":
        layers += [nn.Linear(700, 256, **options), lif(), nn.Linear(256, 256, **options), lif()]
        wide = 256
    else:
        space = dict(kernel_size=(5, 5), strides=4 if tiny else 2)
        layers += [nn.Conv(2, 32, **space, **options), lif(), nn.Conv(32, 64, **space, **options), lif(), nn.mean_pool]
        wide = 64
    layers += [nn.Linear(wide, 20, **options), nn.LI(tau=20.0, implementation=implementation)]
    model = kind(*layers)
    return nn.Pieces(model, length) if length else model


def grid(key, shape, dtype):
    """Multiples of 1/1024 that let the neurons fire at about the rate of the input."""
    most = int(1024 * 0.4 * sqrt(3 / (RATE * jnp.prod(jnp.array(shape[:-1])))))
    return jax.random.randint(key, shape, -most, most + most // 40).astype(dtype) / 1024


def spikes(T, B, case, tiny):
    """Random spikes in int8, drawn a few steps at a time, because the random numbers of all steps may not fit into the memory."""
    shape = (700,) if case == "dense" else (16, 16, 2) if tiny else (64, 64, 2)
    draw = lambda key: jax.random.bernoulli(key, RATE, (B, *shape)).astype(jnp.int8)
    return jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=50))(jax.random.split(jax.random.key(0), T))


class Watched(nn.Temporal):
    """A `Sequential` whose outputs are also those of its last hidden layer."""

    def __init__(self, *layers):
        self.hidden, self.rest = nn.Sequential(*layers[:5]), nn.Sequential(*layers[5:])

    def init_state(self, xs):
        fired, _ = nnx.eval_shape(lambda hidden, xs: hidden(xs), self.hidden, xs)
        return self.hidden.init_state(xs), self.rest.init_state(fired)

    def __call__(self, xs, state=(None, None)):
        fired, first = self.hidden(xs, state[0])
        outs, second = self.rest(fired, state[1])
        return (outs, fired), (first, second)


def compare(case, implementation, T, B, length, tiny):
    """The spikes of the last hidden layer and the gradients of the whole sequence, beside those of the pieces."""
    xs, labels = spikes(T, B, case, tiny), jnp.arange(B) % 10

    @nnx.jit
    def run(model, xs, labels):
        def loss(model):
            (outs, fired), _ = model(xs)
            return cross_entropy(nn.membrane_mean(outs), labels), fired

        return nnx.grad(loss, has_aux=True)(model)

    make = lambda length: network(case, implementation, length, tiny, Watched)
    (whole, fired), (pieces, again) = (run(make(length), xs, labels) for length in (None, length))
    row = dict(firing_rate=float(fired.mean()), flips=int((fired != again).sum()))
    return row | dict(gradient_error=float(largest_error(*map(jax.tree.leaves, (pieces, whole)))))


@question("streaming", gpu=False)
def streaming(args):
    for case in ("dense", "convolutional"):
        for way in ("nn.Stream", "nnx.jit") if case == "dense" else ("nn.Stream",):
            for K in (1, 10, 100):
                key = dict(case=case, implementation=way, T=K, B=1, dtype="float32")
                yield Case(key, latency, (case, way, K, args.tiny))


def latency(case, way, K, tiny):
    model, pieces = network(case, None, None, tiny), np.split(np.asarray(spikes(16 * K, 1, case, tiny)), 16)
    decide = lambda outs: outs[-1].argmax(-1)
    if way == "nn.Stream":
        call = nn.Stream(model, pieces[0][0], read=decide)
    else:
        state = [model.init_state(pieces[0])]

        @nnx.jit
        def run(model, xs, state):
            outs, state = model(xs, state)
            return decide(outs), state

        def call(xs):
            decision, state[0] = run(model, xs, state[0])
            return decision

    turn = itertools.cycle(pieces)
    times = each_ms(lambda: call(next(turn)).item(), 30 if tiny else 1000)
    call_ms, late_ms = np.quantile(times[10:], (0.5, 0.99)).tolist()
    return dict(call_ms=call_ms, late_ms=late_ms, us_per_step=1e3 * call_ms / K)


if __name__ == "__main__":
    main(__doc__, "long_sequences", "streaming")
