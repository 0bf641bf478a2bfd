"""How many time steps does a converted ReLU network need to be as accurate as before?

    python benchmarks/conversion.py              three minutes on a CPU; rows go to results/conversion.jsonl

A convolutional ReLU network learns 4,000 MNIST digits. `interop.relu.to_snn` makes a spiking network of it, with the given percentile of
the activations as the largest rate. Each of 1,000 held-out digits is shown at T steps, and the outputs are averaged over all
steps, or over the last three quarters of them. `relu_accuracy` is that of the ReLU network, `changed` the digits that get another class.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from online import digits
from runner import Case, main, question

from snnfuse import nn
from snnfuse.interop.relu import to_snn

STEPS = (4, 8, 16, 32, 64, 128, 256)


@question("conversion", gpu=False, updates=(600, "training steps of the ReLU network"))
def conversion(args):
    updates, steps = (3, STEPS[:2]) if args.tiny else (args.updates, STEPS)
    for percentile in (99.0, 99.9, 100.0):
        for left_out in (0.0, 0.25):
            for T in steps:
                key = dict(
                    case=f"percentile {percentile:g}", implementation="scan", T=T, note=f"first {left_out:.0%} left out"
                )
                yield Case(key | dict(steps=updates), measure, (percentile, left_out, T, steps[-1], updates))


@cache
def network(updates):
    """The trained ReLU network, and the accuracy on each held-out digit."""
    images, labels = digits()
    rngs = nnx.Rngs(0)
    layers = [
        nnx.Conv(1, 16, (5, 5), 2, rngs=rngs),
        jax.nn.relu,
        nnx.Conv(16, 32, (3, 3), 2, rngs=rngs),
        jax.nn.relu,
        nn.flatten,
    ]
    layers += [nnx.Linear(7 * 7 * 32, 128, rngs=rngs), jax.nn.relu, nnx.Linear(128, 10, rngs=rngs)]
    model = nnx.Sequential(*layers)
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, xs, labels):
        loss = lambda model: optax.softmax_cross_entropy_with_integer_labels(model(xs), labels).mean()
        optimizer.update(model, nnx.grad(loss)(model))

    rng = np.random.default_rng(0)
    for _ in range(updates):
        batch = rng.integers(0, 4000, 64)
        step(model, optimizer, images[batch, :, :, None], labels[batch])
    return model, np.asarray(nnx.jit(lambda model, xs: model(xs))(model, images[4000:, :, :, None]).argmax(-1))


@cache
def outputs(percentile, most, updates):
    """The outputs of the spiking network on the held-out digits, [most, 1000, 10]."""
    images, _ = digits()
    model, _ = network(updates)
    snn = to_snn(model, images[:500, :, :, None], percentile=percentile)
    shown = jnp.asarray(images[4000:, :, :, None])
    stream, piece = nn.Stream(snn, shown), min(most, 16)
    xs = np.broadcast_to(shown, (piece, *shown.shape))
    return np.concatenate([np.asarray(stream(xs)) for _ in range(most // piece)])


def measure(percentile, left_out, T, most, updates):
    labels = digits()[1][4000:]
    relu, outs = network(updates)[1], outputs(percentile, most, updates)[:T]
    found = outs[int(left_out * T) :].mean(0).argmax(-1)
    accuracy = lambda answers: float((answers == labels).mean())
    changed = int((found != relu).sum())
    return dict(held_out_accuracy=accuracy(found), relu_accuracy=accuracy(relu), changed=changed)


if __name__ == "__main__":
    main(__doc__, "conversion")
