"""How many time steps does a converted ReLU network need to be as accurate as before? Are weights of a few bits enough?

    python benchmarks/conversion.py              three minutes on a CPU; rows go to results/conversion.jsonl
    python benchmarks/conversion.py few_bits     ten minutes on a CPU; rows go to results/few_bits.jsonl

A convolutional ReLU network learns 4,000 MNIST digits. `interop.relu.to_snn` makes a spiking network of it, with the given percentile of
the activations as the largest rate. Each of 1,000 held-out digits is shown at T steps, and the outputs are averaged over all
steps, or over the last three quarters of them. `relu_accuracy` is that of the ReLU network, `changed` the digits that get another class.

"few_bits" trains the same network with weights of 8, 4 or 2 bits (`nn.Quantised`), or rounds them after training. `relu` and `spiking`
are the accuracies of seeds 0, 1 and 2 before and after the conversion with the 99th percentile. Biases keep 32 bits.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from online import ADAM, digits
from runner import Case, main, question
from with_jax import step_of, with_adam

from snnfuse import nn
from snnfuse.interop.relu import to_snn

STEPS = (4, 8, 16, 32, 64, 128, 256)


@question("conversion", gpu=False, updates=(600, "training steps of the ReLU network"))
def conversion(args):
    updates, steps = (3, STEPS[:2]) if args.tiny else (args.updates, STEPS)
    for percentile in (99.0, 99.9, 100.0):
        for left_out in (0.0, 0.25):
            for T in steps:
                key = dict(case=f"percentile {percentile:g}", implementation="scan", T=T, steps=updates)
                key |= dict(note=f"first {left_out:.0%} left out")
                yield Case(key, measure, (percentile, left_out, T, steps[-1], updates))


@question("few_bits", gpu=False, updates=(600, "training steps of the ReLU network"))
def few_bits(args):
    for bits, trained in ((32, 32), (8, 8), (8, 32), (4, 4), (4, 32), (2, 2), (2, 32)):
        note = "after training" if trained != bits else "straight-through gradient" if bits < 32 else "none"
        key = dict(case=f"{bits} bits", implementation="scan", T=2 if args.tiny else 32, note=note)
        key |= dict(steps=3 if args.tiny else args.updates)
        yield Case(key, measure_bits, (bits, trained, key["T"], key["steps"], 1 if args.tiny else 3))


def quantised(layers, bits):
    few = lambda x: nn.Quantised(x, bits) if bits < 32 and isinstance(x, nnx.Conv | nnx.Linear) else x
    return nn.Sequential(*map(few, layers))


@cache
def train(updates, bits=32, seed=0):
    """The layers of a trained ReLU network, which must not change; `bits` are those of its weights in training."""
    images, labels = digits()
    rngs = nnx.Rngs(seed)
    layers = [nnx.Conv(1, 16, (5, 5), 2, rngs=rngs), jax.nn.relu, nnx.Conv(16, 32, (3, 3), 2, rngs=rngs), jax.nn.relu]
    layers += [nn.flatten, nnx.Linear(7 * 7 * 32, 128, rngs=rngs), jax.nn.relu, nnx.Linear(128, 10, rngs=rngs)]
    step, objects = nnx.jit(step_of(lambda outs: outs[0])), with_adam(quantised(layers, bits), ADAM)
    rng = np.random.default_rng(seed)
    for _ in range(updates):
        batch = rng.integers(0, 4000, 64)
        step(*objects, images[batch][None, ..., None], labels[batch])
    return layers


def answers(layers):
    """The classes that the ReLU network finds on the held-out digits."""
    outs = nnx.jit(lambda model, xs: model(xs))(nnx.Sequential(*layers), digits()[0][4000:, :, :, None])
    return np.asarray(outs.argmax(-1))


@cache
def network(updates):
    layers = train(updates, 32, 0)  # as few_bits calls it
    return layers, answers(layers)


@cache
def outputs(percentile, most, updates):
    return spiking(network(updates)[0], percentile, most)


def spiking(layers, percentile, most):
    """The outputs of the spiking network on the held-out digits, [most, 1000, 10]."""
    images, _ = digits()
    snn = to_snn(layers, images[:500, :, :, None], percentile=percentile)
    shown = jnp.asarray(images[4000:, :, :, None])
    stream, piece = nn.Stream(snn, shown), min(most, 16)
    xs = np.broadcast_to(shown, (piece, *shown.shape))
    return np.concatenate([np.asarray(stream(xs)) for _ in range(most // piece)])


accuracy = lambda found: float((found == digits()[1][4000:]).mean())


def measure(percentile, left_out, T, most, updates):
    relu, outs = network(updates)[1], outputs(percentile, most, updates)[:T]
    found = outs[int(left_out * T) :].mean(0).argmax(-1)
    changed = int((found != relu).sum())
    return dict(held_out_accuracy=accuracy(found), relu_accuracy=accuracy(relu), changed=changed)


def measure_bits(bits, trained, T, updates, seeds):
    found = dict(relu=[], spiking=[])
    for seed in range(seeds):
        layers = [nnx.clone(x) if isinstance(x, nnx.Module) else x for x in train(updates, trained, seed)]
        for layer in quantised(layers, bits).layers:
            if isinstance(layer, nn.Quantised):
                integers, step = layer.integers()
                layer.layer.kernel[...] = integers * step
        found["relu"].append(accuracy(answers(layers)))
        found["spiking"].append(accuracy(spiking(layers, 99.0, T).mean(0).argmax(-1)))
    return found


if __name__ == "__main__":
    main(__doc__, "conversion", "few_bits")
