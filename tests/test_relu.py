"""A ReLU network as a spiking one: rates within a bound of theory, logits that approach those of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snnfuse import nn
from snnfuse.interop.relu import to_snn

X = jax.random.normal(jax.random.key(0), (40, 6))
flat = lambda x: x.reshape(len(x), -1)


def network():
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(12, rngs=rngs)
    norm.mean[...], norm.var[...] = 0.1 * jnp.arange(12.0), 1 + 0.1 * jnp.arange(12.0)
    layers = [
        nnx.Linear(6, 16, rngs=rngs),
        jax.nn.relu,
        nnx.Linear(16, 12, rngs=rngs),
        norm,
        nnx.relu,
        nnx.Dropout(0.5, rngs=rngs),
    ]
    model = nnx.Sequential(*layers, flat, nnx.Linear(12, 4, rngs=rngs))
    model.eval()
    return model


def test_a_rate_is_the_activation_within_one_spike():
    """With a constant input and a soft reset, a membrane stays in [0, 1): the rate errs by less than 1 / T."""
    model, T = network(), 50
    snn = to_snn(model, X, percentile=95)
    rate = nn.spike_rate(nn.Sequential(*snn.layers[:2])(jnp.broadcast_to(X, (T, *X.shape)))[0])
    activations = np.asarray(jax.nn.relu(model.layers[0](X)), np.float64)
    largest = np.percentile(activations, 95)
    assert np.abs(rate - np.clip(activations / largest, 0, 1)).max() <= 1 / T + 1e-5
    assert (activations > largest).any()


def test_logits_approach_those_of_the_network():
    model = network()
    before, want = jax.tree.map(np.asarray, nnx.state(model, nnx.Param)), model(X)
    snn = to_snn(model, X, percentile=100)
    errors = []
    for T in (10, 100, 1000):
        outs, _ = snn(jnp.broadcast_to(X, (T, *X.shape)))
        errors.append(float(np.abs(outs[T // 4 :].mean(0) - want).max() / np.abs(want).max()))
    assert errors[2] < 0.02 and errors[2] < errors[1] < errors[0], errors
    assert (outs[250:].mean(0).argmax(-1) == want.argmax(-1)).mean() > 0.94
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.Param))


def test_convolutions_and_a_relu_at_the_end():
    rngs, x = nnx.Rngs(1), jax.random.uniform(jax.random.key(1), (5, 6, 6, 2))
    pool = lambda x: nnx.avg_pool(x, (2, 2), (2, 2))
    layers = [
        nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs),
        jax.nn.relu,
        pool,
        flat,
        nnx.Linear(36, 3, rngs=rngs),
        jax.nn.relu,
    ]
    model = nnx.Sequential(*layers)
    outs, _ = to_snn(model, x, percentile=100)(jnp.broadcast_to(x, (600, *x.shape)))
    np.testing.assert_allclose(outs[100:].mean(0), model(x), atol=0.03 * float(model(x).max()))


@pytest.mark.parametrize(
    "layers, message",
    [
        ([jax.nn.relu], "layer 0, a ReLU, must come right after"),
        ([nnx.Linear(6, 3, rngs=nnx.Rngs(0)), jax.nn.tanh], r"layer 1 must keep a factor, f\(2 x\) = 2 f\(x\)"),
        (
            [nnx.Linear(6, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))],
            "layer 1, a BatchNorm, must be in evaluation",
        ),
    ],
)
def test_layers_without_a_counterpart_are_refused(layers, message):
    with pytest.raises(NotImplementedError, match=message):
        to_snn(layers, X)


def test_the_percentile_is_checked():
    with pytest.raises(ValueError, match="percentile must be above 0 and at most 100; got 0"):
        to_snn([jax.nn.relu], X, percentile=0)
