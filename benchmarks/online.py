"""Do online rules learn as well as backpropagation through time, and does their memory stay the same?

    python benchmarks/online.py                  rows go to results/online.jsonl
    python benchmarks/online.py --steps 300 --seeds 1         less, for a CPU

The task is MNIST row by row: 28 steps of 28 pixels, 4,000 digits for training and 1,000 held out. The network "convolutional" sees the
whole digit at each of 8 steps. All rules of a network start from the same weights and see the same batches; the loss is the cross-entropy of the outputs at every step. "bptt" differentiates the whole
sequence; the other rules take one step at a time with `online.gradients`. `held_out_accuracy` is the mean over the seeds, `accuracies`
has each. Rows of the case "memory" hold `temporary_mb`: what a training step with a batch of 100 needs beside its input, weights and
optimizer, for sequences of T steps. They are compiled and not run.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from runner import Case, main, question
from with_jax import f32, with_adam

import snnfuse as sf
from snnfuse import nn, online, training
from snnfuse.data.builders.images import mnist5k

RULES = {
    "dense": ("bptt", "sltt", "ottt"),
    "recurrent": ("bptt", "ottt"),
    "adaptive": ("bptt", "e-prop", "e-prop, random feedback"),
    "convolutional": ("bptt", "sltt", "ottt"),
}
STEPS = dict(convolutional=8)
DECAY, OUT_DECAY, HIDDEN, B = 0.8, 0.9, 128, 100
ADAM = optax.adam(2e-3)  # one for all models, so that a rule compiles once


@question("online", gpu=False, steps=(1500, "training steps"), seeds=(3, "runs of each rule"))
def cases(args):
    for network, rules in RULES.items():
        for rule in rules:
            case = f"{'MNIST' if network == 'convolutional' else 'MNIST by rows'}, {network}"
            key = dict(case=case, implementation=rule, T=steps_of(network), B=B, steps=4 if args.tiny else args.steps)
            yield Case(key, accuracy, (network, rule, key["steps"], args.seeds), f"{network} {rule}")
    for T in (28,) if args.tiny else (100, 1_000, 10_000):
        for network, rules in RULES.items():
            for rule in rules[:2] if network != "convolutional" or T <= 1_000 else ():
                key = dict(case=f"memory, {network}", implementation=rule, T=T, B=B)
                yield Case(key, memory, (network, rule, T), f"{network} {rule}")


def build(network, rule, seed):
    """A network that learns by a rule; its weights depend on the network and the seed only."""
    rngs = nnx.Rngs(seed)
    linear = lambda n, m: nn.Linear(n, m, kernel_init=nnx.initializers.lecun_normal(), rngs=rngs)
    last = [linear(HIDDEN, 10), nn.LI(decay=OUT_DECAY)]
    if network == "adaptive":
        options = dict(decay=DECAY, decay_adapt=0.95, beta=0.3, reset=sf.SoftReset(detach=True))
        hidden = online.Eprop(nn.AdaptiveLIF(**options), 28, HIDDEN, decay_out=OUT_DECAY, rngs=rngs)
        if rule == "bptt":
            first = nn.Linear(28, HIDDEN, use_bias=False, rngs=nnx.Rngs(0))
            again = nn.Recurrent(nn.AdaptiveLIF(**options), HIDDEN, self_connections=False, rngs=nnx.Rngs(0))
            first.kernel[...], again.weight[...] = hidden.kernel[...], hidden.weight[...]
            return nn.Sequential(first, again, *last)
        if rule.endswith("feedback"):
            back = online.RandomFeedback(HIDDEN, 10, rngs=nnx.Rngs(seed))
            back.kernel[...], last[0] = last[0].kernel[...], back
        return nn.Sequential(hidden, *last)
    second = [linear(HIDDEN, HIDDEN), nn.LIF(decay=DECAY)]
    if network == "recurrent":
        second = [nn.Recurrent(nn.LIF(decay=DECAY), HIDDEN, scale=0.5, rngs=rngs)]
    if network == "convolutional":
        conv = partial(nn.Conv, strides=2, kernel_init=nnx.initializers.lecun_normal(), rngs=rngs)
        layers = [conv(1, 16, (5, 5)), nn.LIF(decay=DECAY), conv(16, 32, (3, 3)), nn.LIF(decay=DECAY)]
        model = nn.Sequential(*layers, nn.flatten, linear(7 * 7 * 32, 10), nn.LI(decay=OUT_DECAY))
        return model if rule == "bptt" else getattr(online, rule)(model)
    first = [linear(28, HIDDEN)] if network == "recurrent" else [linear(28, HIDDEN), nn.LIF(decay=DECAY)]
    model = nn.Sequential(*first, *second, *last)
    return model if rule == "bptt" else getattr(online, rule)(model)


def training_step(rule):
    @training.compiled_step
    def step(model, optimizer, xs, labels):
        targets = jax.nn.one_hot(labels, 10)
        every = lambda outs: optax.softmax_cross_entropy(outs, jnp.broadcast_to(targets, outs.shape))
        loss = lambda outs: every(outs).mean(1).sum() / len(xs)
        if rule == "bptt":
            value, grads = nnx.value_and_grad(lambda model: loss(model(xs)[0]))(model)
        else:
            value, grads, _ = online.gradients(model, loss, xs)
        optimizer.update(model, grads)
        return value

    return step


@cache
def digits():
    """(images [5000, 28, 28] in 0..1, labels), in an order of chance."""
    images, labels = mnist5k()
    order = np.random.default_rng(0).permutation(len(images))
    return np.asarray(images, np.float32)[order].reshape(-1, 28, 28) / 255, labels[order].astype(np.int32)


steps_of = lambda network: STEPS.get(network, 28)


def sequence(network, images):
    """[T, B, 28] rows of images [B, 28, 28], or [T, B, 28, 28, 1], the same at all steps."""
    if network == "convolutional":
        return np.broadcast_to(images[None, ..., None], (steps_of(network), *images.shape, 1))
    return images.swapaxes(0, 1)


def accuracy(network, rule, steps, seeds):
    images, labels = digits()
    step, evaluate, found = training_step(rule), nnx.jit(lambda model, xs: model(xs)[0].sum(0)), []
    for seed in range(seeds):
        model, optimizer = with_adam(build(network, rule, seed), ADAM)
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            batch = rng.integers(0, 4000, B)
            loss = step(model, optimizer, sequence(network, images[batch]), labels[batch])
        logits = evaluate(model, sequence(network, images[4000:]))
        found.append(float((logits.argmax(-1) == labels[4000:]).mean()))
    return dict(held_out_accuracy=float(np.mean(found)), accuracies=found, final_loss=float(loss))


def memory(network, rule, T):
    step, objects = training_step(rule), with_adam(build(network, rule, 0), ADAM)
    shape = (T, B, 28, 28, 1) if network == "convolutional" else (T, B, 28)
    xs, labels = jax.ShapeDtypeStruct(shape, f32), jax.ShapeDtypeStruct((B,), jnp.int32)
    sizes = step.lower(*objects, xs, labels).compile().memory_analysis()
    return dict(temporary_mb=sizes.temp_size_in_bytes / 1e6)


if __name__ == "__main__":
    main(__doc__, "online")
