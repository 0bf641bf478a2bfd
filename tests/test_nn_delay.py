"""`nn.Delay` and `nn.DelayedLinear` beside direct sums in NumPy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from snnfuse import nn, training

T, B, IN, OUT, D = 9, 2, 3, 4, 5
RNG = np.random.default_rng(0)
XS = RNG.normal(size=(T, B, IN))


def weights64(layer):
    """g_k of each delay, [D + 1, ...]."""
    delay = layer.max_delay / (1 + np.exp(-np.asarray(layer.raw_delay[...], np.float64)))
    k = np.arange(layer.max_delay + 1).reshape(-1, *(1,) * delay.ndim)
    if layer.deterministic:
        return 1.0 * (np.abs(k - delay) < 0.5)
    sigma = float(layer.sigma[...])
    if layer.interpolation == "gaussian":
        power = -((k - delay) ** 2) / (2 * sigma**2)
        g = np.exp(power - power.max(0))
    else:
        g = np.maximum(0, 1 + sigma - np.abs(k - delay))
    return g / g.sum(0)


def direct(layer, xs):
    """The sums of the docstrings, one step, one delay at a time."""
    g = weights64(layer)
    if isinstance(layer, nn.DelayedLinear):
        g = g * np.asarray(layer.kernel[...], np.float64)
    bias = 0 if isinstance(layer, nn.Delay) or layer.bias is None else np.asarray(layer.bias[...], np.float64)
    outs = []
    for t in range(len(xs)):
        late = [(xs[t - k], g[k]) for k in range(layer.max_delay + 1) if k <= t]
        outs.append(sum(x * w if w.ndim == 1 else x @ w for x, w in late) + bias)
    return np.stack(outs)


def make(kind, interpolation="gaussian", **options):
    rngs = nnx.Rngs(1)
    if kind == "axonal":
        return nn.Delay(IN, D, interpolation=interpolation, rngs=rngs, **options)
    layer = nn.DelayedLinear(IN, OUT, D, interpolation=interpolation, rngs=rngs, **options)
    layer.bias[...] = jnp.arange(4.0)
    return layer


KINDS = pytest.mark.parametrize("kind", ["axonal", "synaptic"])


def in_float64(layer):
    """The same layer with parameters in float64."""
    graphdef, state = nnx.split(layer)
    return nnx.merge(graphdef, jax.tree.map(lambda x: np.asarray(x, np.float64), state))


@KINDS
@pytest.mark.parametrize(
    "interpolation, sigma", [("gaussian", 2.0), ("gaussian", 0.1), ("triangle", 1.5), ("triangle", 0.0)]
)
def test_outputs_and_gradients_are_those_of_the_direct_sum(kind, interpolation, sigma):
    layer, h = make(kind, interpolation, sigma=sigma), 1e-6
    with jax.enable_x64(True):
        wide = in_float64(layer)
        np.testing.assert_allclose(wide(XS)[0], direct(wide, XS), rtol=1e-9, atol=1e-9)
        cotangent = RNG.normal(size=direct(wide, XS).shape)
        loss = lambda layer, xs: (layer(xs)[0] * cotangent).sum()
        of_layer, of_xs = nnx.grad(loss, argnums=(0, 1))(wide, jnp.asarray(XS))
        for name in ("raw_delay", *(("kernel", "bias") if kind == "synaptic" else ())):
            variable = getattr(wide, name)
            value = np.array(variable[...])
            way = RNG.normal(size=value.shape)
            moved = []
            for step in (h, -h):
                variable[...] = value + step * way
                moved.append((direct(wide, XS) * cotangent).sum())
            variable[...] = value
            np.testing.assert_allclose(
                (of_layer[name][...] * way).sum(), (moved[0] - moved[1]) / (2 * h), rtol=1e-5, atol=1e-7
            )
        way = RNG.normal(size=XS.shape)  # the outputs are linear in xs
        slope = ((direct(wide, XS + way) - direct(wide, XS)) * cotangent).sum()
        np.testing.assert_allclose((of_xs * way).sum(), slope, rtol=1e-9)


@KINDS
def test_evaluation_rounds_the_delays(kind):
    layer = make(kind)
    soft, _ = layer(jnp.asarray(XS, jnp.float32))
    layer.eval()
    hard, _ = layer(jnp.asarray(XS, jnp.float32))
    assert np.isin(np.asarray(layer.taps), (0, 1)).all() and (np.asarray(layer.taps).sum(0) == 1).all()
    np.testing.assert_allclose(hard, direct(layer, XS), rtol=1e-5, atol=1e-5)
    assert np.abs(soft - hard).max() > 0.1
    if kind == "axonal":  # a shift by whole steps
        late = int(np.round(layer.delay[0]))
        np.testing.assert_allclose(hard[late:, :, 0], XS[: T - late, :, 0], rtol=1e-6)


@KINDS
@pytest.mark.parametrize("length", [1, 2, 9])
def test_pieces_equal_the_whole(kind, length):
    layer = make(kind)
    xs = jnp.asarray(XS, jnp.float32)
    want, after = layer(xs)
    outs, state = [], None
    for start in range(0, T, length):
        out, state = layer(xs[start : start + length], state)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(state, after)
    np.testing.assert_array_equal(state, xs[T - D :])
    np.testing.assert_allclose(nn.Pieces(layer, 4)(xs)[0], want, rtol=1e-5, atol=1e-5)


@KINDS
def test_sixteen_bits_and_packed_spikes(kind):
    layer = make(kind)
    spikes = (XS > 0.5).astype(np.float32)
    want = direct(layer, spikes)
    outs, state = layer(jnp.asarray(spikes, jnp.bfloat16))
    assert outs.dtype == state.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(outs, np.float32), want, atol=0.02 * np.abs(want).max())
    np.testing.assert_allclose(layer(nn.Spikes.of(jnp.asarray(spikes)))[0], want, rtol=1e-5, atol=1e-5)


def test_training_finds_a_delay_while_the_width_shrinks():
    """The target is the input, 3 and 1 steps late."""
    xs = jnp.asarray(np.random.default_rng(2).random((40, 4, 2)) < 0.2, jnp.float32)
    target = jnp.stack([jnp.roll(xs[..., 0], 3, 0).at[:3].set(0), jnp.roll(xs[..., 1], 1, 0).at[:1].set(0)], -1)
    model = nn.Sequential(nn.Delay(2, 6, rngs=nnx.Rngs(3)))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    widths = optax.exponential_decay(3.0, 100, 0.15, end_value=0.3)

    @training.compiled_step
    def step(model, optimizer, xs, target):
        nn.sharpen(model, widths(optimizer.step[...]))
        loss, grads = nnx.value_and_grad(lambda model: jnp.square(model(xs)[0] - target).mean())(model)
        optimizer.update(model, grads)
        return loss

    for _ in range(150):
        step(model, optimizer, xs, target)
    assert float(model.layers[0].sigma[...]) == pytest.approx(0.3)
    model.eval()
    np.testing.assert_array_equal(model(xs)[0], target)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Delay(3, 0, rngs=nnx.Rngs(0)), "max_delay must be a whole number of steps, at least 1; got 0"),
        (lambda: nn.Delay(3, 2, sigma=0.0, rngs=nnx.Rngs(0)), "sigma must be above 0 and finite .* got 0.0"),
        (
            lambda: nn.Delay(3, 2, interpolation="cubic", rngs=nnx.Rngs(0)),
            "interpolation must be 'gaussian' or 'triangle'",
        ),
        (lambda: make("axonal")(jnp.zeros((3, 2, 4))), r"xs must be floats \[T, \*B, 3\] .* got float32\(3, 2, 4\)"),
        (
            lambda: make("synaptic")(jnp.zeros((3, 2, 3)), jnp.zeros((2, 2, 3))),
            "state must be the input of the last 5 steps",
        ),
        *(
            (
                lambda sigma=sigma: nn.sharpen(nn.Delay(3, 2, rngs=nnx.Rngs(0)), sigma),
                "sigma must be above 0 and finite",
            )
            for sigma in (0.0, -1.0, float("nan"), jnp.ones(3))
        ),
        (lambda: nn.sharpen(nn.LIF(tau=2.0), 1.0), "model must have a Delay or DelayedLinear; got LIF without one"),
    ],
)
def test_bad_use_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
