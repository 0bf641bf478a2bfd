"""The parallel spiking neurons beside their equations in NumPy, in float64: spikes and every gradient."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_fires
from flax import nnx

import snnfuse as sf
from snnfuse import nn

T, K = 7, 3
RNG = np.random.default_rng(0)
XS = RNG.normal(0.6, 1.5, (T, 2, 5))
SURROGATE = sf.Sigmoid(2.0)
MAKE = {
    "PSN": lambda: nn.PSN(T, surrogate=SURROGATE, rngs=nnx.Rngs(0)),
    "MaskedPSN": lambda: nn.MaskedPSN(T, K, surrogate=SURROGATE, rngs=nnx.Rngs(0)),
    "half masked": lambda: nn.MaskedPSN(T, K, progress=0.5, surrogate=SURROGATE, rngs=nnx.Rngs(0)),
    "SlidingPSN": lambda: nn.SlidingPSN(K, surrogate=SURROGATE),
}
LAYERS = pytest.mark.parametrize("name", MAKE)


def matrix(layer, weight):
    """The paper's [T, T] matrix over time."""
    full = np.zeros((T, T))
    for t in range(T):
        for s in range(T):
            inside = t - K < s <= t
            if isinstance(layer, nn.SlidingPSN):
                full[t, s] = weight[t - s] if inside else 0
            elif isinstance(layer, nn.MaskedPSN):
                full[t, s] = weight[t, s] * (1 if inside else 1 - float(layer.progress[...]))
            else:
                full[t, s] = weight[t, s]
    return full


def run(layer, xs):
    outs = layer(xs)
    return outs[0] if isinstance(layer, nn.SlidingPSN) else outs


@LAYERS
def test_spikes_and_gradients_are_those_of_the_paper(name):
    layer = MAKE[name]()
    with jax.enable_x64(True):
        graphdef, state = nnx.split(layer)
        layer = nnx.merge(graphdef, jax.tree.map(lambda x: np.asarray(x, np.float64), state))
        weight = np.asarray(layer.weight[...]) + 0.3 * RNG.normal(size=layer.weight[...].shape)
        threshold = np.asarray(layer.threshold[...]) - 0.3 * RNG.random(layer.threshold[...].shape)
        layer.weight[...], layer.threshold[...] = weight, threshold
        full = matrix(layer, weight)
        h = np.einsum("ts,sbn->tbn", full, XS) - (threshold if np.ndim(threshold) == 0 else threshold[:, None, None])
        assert np.abs(h).min() > 1e-9
        spikes = run(layer, jnp.asarray(XS))
        np.testing.assert_array_equal(spikes, h >= 0)
        assert_fires(spikes, high=0.7)
        d_out = RNG.normal(size=h.shape)
        of_layer, of_xs = nnx.grad(lambda layer, xs: (run(layer, xs) * d_out).sum(), argnums=(0, 1))(
            layer, jnp.asarray(XS)
        )
        d_h = d_out * np.asarray(SURROGATE(jnp.asarray(h)))
        np.testing.assert_allclose(of_xs, np.einsum("ts,tbn->sbn", full, d_h), rtol=1e-9)
        d_full = np.einsum("tbn,sbn->ts", d_h, XS)
        moved = lambda weight: (matrix(layer, weight) * d_full).sum()  # linear in the weight
        unit = np.eye(weight.size).reshape(-1, *weight.shape)
        np.testing.assert_allclose(of_layer["weight"][...].ravel(), [moved(e) for e in unit], rtol=1e-9, atol=1e-12)
        d_threshold = -d_h.sum() if np.ndim(threshold) == 0 else -d_h.sum((1, 2))
        np.testing.assert_allclose(of_layer["threshold"][...], d_threshold, rtol=1e-9)


@LAYERS
def test_it_is_that_of_spikingjelly(name):
    golden = dict(np.load(Path(__file__).with_name("golden") / "psn.npz"))
    want = {key.split("/")[1]: value for key, value in golden.items() if key.startswith(f"{name}/")}
    layer = {
        "PSN": lambda: nn.PSN(6, rngs=nnx.Rngs(0)),
        "MaskedPSN": lambda: nn.MaskedPSN(6, K, rngs=nnx.Rngs(0)),
        "half masked": lambda: nn.MaskedPSN(6, K, progress=0.5, rngs=nnx.Rngs(0)),
        "SlidingPSN": lambda: nn.SlidingPSN(K),
    }[name]()
    newest_first = slice(None, None, -1) if name == "SlidingPSN" else slice(None)
    layer.weight[...] = want["weight"][newest_first]
    layer.threshold[...] = -want["bias"].reshape(layer.threshold[...].shape)
    np.testing.assert_array_equal(run(layer, jnp.asarray(golden["x"])), want["y"])
    pulled = nnx.grad(lambda layer, xs: (run(layer, xs) * golden["g"]).sum(), argnums=(0, 1))
    of_layer, d_x = pulled(layer, jnp.asarray(golden["x"]))
    np.testing.assert_allclose(d_x, want["d_x"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_layer["weight"][...][newest_first], want["d_weight"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(-of_layer["threshold"][...].ravel(), want["d_bias"].ravel(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_sliding_neuron_runs_in_pieces(length):
    layer, xs = MAKE["SlidingPSN"](), jnp.asarray(XS, jnp.float32)
    want, after = layer(xs)
    assert_fires(want, high=0.7)
    outs, state = [], None
    for start in range(0, T, length):
        out, state = layer(xs[start : start + length], state)
        outs.append(out)
    np.testing.assert_array_equal(np.concatenate(outs), want)
    np.testing.assert_array_equal(state, after)
    stream = nn.Stream(layer, xs[0])
    np.testing.assert_array_equal(np.concatenate([stream(x[None]) for x in xs]), want)


def test_a_causal_neuron_does_not_see_the_future():
    xs, later = jnp.asarray(XS, jnp.float32), jnp.asarray(XS, jnp.float32).at[4:].add(5.0)
    for name in MAKE:
        layer = MAKE[name]()
        same = np.array_equal(run(layer, xs)[:4], run(layer, later)[:4])
        assert same == (name in ("MaskedPSN", "SlidingPSN")), name


def test_sixteen_bits_and_packed_spikes():
    spikes = jnp.asarray(XS > 0.5, jnp.float32)
    for name in MAKE:
        layer = MAKE[name]()
        assert run(layer, spikes.astype(jnp.bfloat16)).dtype == jnp.bfloat16
        np.testing.assert_array_equal(run(layer, nn.Spikes.of(spikes)), run(layer, spikes))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: nn.PSN(0, rngs=nnx.Rngs(0)), ValueError, "T must be a whole number of steps, at least 1; got 0"),
        (
            lambda: nn.MaskedPSN(4, 0, rngs=nnx.Rngs(0)),
            ValueError,
            "order must be a whole number of steps, at least 1; got 0",
        ),
        (
            lambda: nn.MaskedPSN(4, 2, progress=2.0, rngs=nnx.Rngs(0)),
            ValueError,
            r"progress must be in \[0, 1\]; got 2.0",
        ),
        (lambda: MAKE["PSN"]()(jnp.zeros((4, 2, 3))), ValueError, "xs must have T = 7 steps, .* got 4"),
        (lambda: MAKE["PSN"]()(jnp.zeros((7, 2, 3), int)), ValueError, r"xs must be floats \[T, \*B, N\] .* got int32"),
        (
            lambda: nn.SlidingPSN(2)(jnp.zeros((4, 2, 3)), jnp.zeros((2, 2, 3))),
            ValueError,
            "state must be the input of the last 1",
        ),
        (lambda: nn.SlidingPSN(2, surrogate="atan"), TypeError, "surrogate must be an object"),
    ],
)
def test_bad_use_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
