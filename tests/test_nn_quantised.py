"""Weights of few bits, TEBN and the norms of Flax before a neuron, beside NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snnfuse import nn

RNG = np.random.default_rng(0)


def rounded64(kernel, bits):
    most = 2 ** (bits - 1) - 1
    step = np.abs(kernel).max(tuple(range(kernel.ndim - 1))) / most
    return np.round(kernel / step) * step


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_rounded_and_the_gradient_passes(bits):
    linear = nn.Linear(5, 3, rngs=nnx.Rngs(0))
    layer, xs, d = nn.Quantised(linear, bits), RNG.normal(size=(4, 2, 5)), RNG.normal(size=(4, 2, 3))
    kernel = np.asarray(linear.kernel[...], np.float64)
    np.testing.assert_allclose(layer(jnp.asarray(xs, jnp.float32)), xs @ rounded64(kernel, bits), rtol=1e-4, atol=1e-5)
    loss = lambda layer, xs: (layer(xs) * d.astype(np.float32)).sum()
    of_layer, of_xs = nnx.grad(loss, argnums=(0, 1))(layer, jnp.asarray(xs, jnp.float32))
    np.testing.assert_allclose(of_layer["layer"]["kernel"][...], np.einsum("tbi,tbo->io", xs, d), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_xs, d @ rounded64(kernel, bits).T, rtol=1e-4, atol=1e-5)
    integers, step = layer.integers()
    assert integers.dtype == jnp.int8 and np.abs(integers).max() == 2 ** (bits - 1) - 1
    np.testing.assert_allclose(integers * step, rounded64(kernel, bits), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(linear.kernel[...], kernel.astype(np.float32))  # what is trained stays


def test_convolutions_packed_spikes_and_weights_of_zero():
    for conv in (nn.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0)), nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0))):
        xs = jnp.asarray(RNG.random((4, 2, 5, 5, 2)) < 0.4, jnp.float32)
        want = nnx.clone(conv)
        want.kernel[...] = rounded64(np.asarray(conv.kernel[...], np.float64), 4).astype(np.float32)
        run = lambda layer, xs=xs: nn.Sequential(layer)(xs)[0]
        np.testing.assert_allclose(run(nn.Quantised(conv, 4)), run(want), rtol=1e-4, atol=1e-5)
    spikes = nn.Spikes.of(xs)
    layer = nn.Quantised(nn.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(layer(spikes), layer(xs), rtol=1e-5, atol=1e-6)
    layer.layer.kernel[...] *= 0
    assert np.isfinite(layer(xs)).all()


def test_tebn_weighs_the_steps():
    T, xs = 3, RNG.normal(2, 3, (3, 4, 5))
    norm = nn.TEBN(T, 5, gain=0.5, rngs=nnx.Rngs(0))
    norm.step_scale[...], norm.bias[...] = jnp.array([0.5, 1.0, 2.0]), jnp.arange(5.0)
    want = 0.5 * (xs - xs.mean((0, 1))) / np.sqrt(xs.var((0, 1)) + norm.epsilon) + np.arange(5.0)
    want = np.array([0.5, 1.0, 2.0])[:, None, None] * want
    np.testing.assert_allclose(norm(jnp.asarray(xs, jnp.float32)), want, rtol=1e-4, atol=1e-4)
    d = RNG.normal(size=xs.shape)
    grads = nnx.grad(lambda norm: (norm(jnp.asarray(xs, jnp.float32)) * d).sum())(norm)
    by_step = np.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(grads["step_scale"][...], (want * d).sum((1, 2)) / by_step, rtol=1e-3, atol=1e-3)
    norm.eval()
    mean, var = np.asarray(norm.mean[...]), np.asarray(norm.var[...])
    want = 0.5 * (xs - mean) / np.sqrt(var + norm.epsilon) + np.arange(5.0)
    np.testing.assert_allclose(norm(jnp.asarray(xs, jnp.float32)), by_step[:, None, None] * want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [nnx.LayerNorm, nnx.RMSNorm])
def test_norms_of_a_sample_run_before_a_neuron_and_in_pieces(kind):
    xs = jnp.asarray(RNG.normal(1, 2, (7, 3, 5)), jnp.float32)
    model = nn.Sequential(kind(5, rngs=nnx.Rngs(0)), nn.LIF(tau=2.0))
    centred = xs - (xs.mean(-1, keepdims=True) if kind is nnx.LayerNorm else 0)
    normed = centred / np.sqrt((np.asarray(centred) ** 2).mean(-1, keepdims=True) + 1e-6)
    want, _ = nn.LIF(tau=2.0)(normed)
    assert 0.02 < want.mean() < 0.5
    np.testing.assert_array_equal(model(xs)[0], want)
    np.testing.assert_array_equal(nn.Pieces(model, 3)(xs)[0], want)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: nn.Quantised(nn.LIF(tau=2.0)), TypeError, "layer must be an nnx.Linear or nnx.Conv; got LIF"),
        (
            lambda: nn.Quantised(nn.Linear(2, 2, rngs=nnx.Rngs(0)), 1),
            ValueError,
            "bits must be a whole number from 2 to 8; got 1",
        ),
        (lambda: nn.TEBN(0, 2, rngs=nnx.Rngs(0)), ValueError, "T must be a whole number of steps, at least 1; got 0"),
        (lambda: nn.TEBN(3, 2, rngs=nnx.Rngs(0))(jnp.ones((2, 2, 2))), ValueError, "xs must have T = 3 steps; got 2"),
        (lambda: nn.TEBN(3, 2, per_step=True, rngs=nnx.Rngs(0)), ValueError, "per_step is not an option of TEBN"),
    ],
)
def test_bad_use_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
