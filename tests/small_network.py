"""A small spiking network, its training step and its batch: for tests on one device, on many, and on two hosts."""

import jax
import jax.numpy as jnp
from flax import nnx

from snnfuse import nn, parallel

T, B, CLASSES = 8, 16, 5


def network(axes=(), implementation="scan"):
    rngs = nnx.Rngs(0)
    how = {"implementation": implementation}
    model = nn.Sequential(
        nnx.Conv(1, 4, (3, 3), strides=(2, 2), use_bias=False, rngs=rngs),
        nnx.BatchNorm(4, rngs=rngs),
        nn.LIF(decay=0.6, learn="decay", shape=(4,), threshold=0.9, **how),
        nn.flatten,
        nnx.Linear(64, CLASSES, rngs=rngs),
        nn.LI(decay=0.8, **how),
    )
    if axes:
        parallel.synchronise_batch_norm(model, axes)
    if "time" in axes:
        parallel.over_time(model)
    return nnx.split(model)


def train_step(graphdef, read, state, batch):
    xs, labels = batch

    def loss_of(model):
        logits = read(model(xs)[0])
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()
        return loss, (logits.argmax(-1) == labels).sum()

    model = nnx.merge(graphdef, state)
    (loss, correct), grads = nnx.value_and_grad(loss_of, has_aux=True)(model)
    grads = parallel.mean_gradients(grads)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    return nnx.state(model), {"loss": loss, "correct": correct, "grads": grads}


def images(B=B, T=T):
    keys = jax.random.split(jax.random.key(1))
    return jax.random.normal(keys[0], (T, B, 8, 8, 1)), jax.random.randint(keys[1], (B,), 0, CLASSES)
