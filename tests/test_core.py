"""Surrogates, resets and neurons: exact derivatives, finite differences, and the equations of the literature in NumPy."""

import dataclasses
import inspect
import re
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_fires, assert_same_spikes
from jax.flatten_util import ravel_pytree

import snnfuse as sf
from snnfuse import nn

pytestmark = pytest.mark.usefixtures("strict")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def run(neuron, params, state, xs, implementation="scan"):
    return jax.jit(partial(sf.unroll, neuron, implementation=implementation))(params, state, xs)


# ---- surrogates

normal = lambda u, sd: np.exp(-0.5 * (u / sd) ** 2) / (sd * np.sqrt(2 * np.pi))
SURROGATES = {
    "atan": (sf.ATan(), lambda u: 1 / (1 + (np.pi * u) ** 2)),
    "atan_5": (sf.ATan(5.0), lambda u: 2.5 / (1 + (2.5 * np.pi * u) ** 2)),
    "sigmoid": (sf.Sigmoid(), lambda u: 4 * np.exp(-4 * u) / (1 + np.exp(-4 * u)) ** 2),
    "fast_sigmoid": (sf.FastSigmoid(), lambda u: (1 + 10 * np.abs(u)) ** -2.0),
    "triangle": (sf.Triangle(0.3, 0.8), lambda u: np.where(np.abs(u) < 0.8, 0.3 * (1 - np.abs(u) / 0.8), 0)),
    "piecewise_quadratic": (sf.PiecewiseQuadratic(1.5), lambda u: np.maximum(0, 1.5 - 1.5**2 * np.abs(u))),
    "rectangle": (sf.Rectangle(), lambda u: np.where(np.abs(u) < 0.5, 1.0, 0.0)),
    "rectangle_0.6": (sf.Rectangle(0.6), lambda u: np.where(np.abs(u) < 0.3, 1 / 0.6, 0.0)),
    "gaussian": (sf.Gaussian(), lambda u: 2 / np.sqrt(np.pi) * np.exp(-((2 * u) ** 2))),
    "multi_gaussian": (
        sf.MultiGaussian(),
        lambda u: 0.5 * (1.15 * normal(u, 0.5) - 0.15 * (normal(u - 0.5, 3) + normal(u + 0.5, 3))),
    ),
    "leaky_relu": (sf.LeakyReLU(0.2, 1.5), lambda u: np.where(u >= 0, 1.5, 0.2)),
}
AREA_ONE = ["atan", "atan_5", "sigmoid", "piecewise_quadratic", "rectangle", "rectangle_0.6", "gaussian"]
GRID = np.linspace(-3, 3, 400) + 1e-3 / np.pi  # no kink of the above within 1e-4 of it


@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_is_its_formula_and_the_derivative_of_its_relaxation(name, x64):
    surrogate, formula = SURROGATES[name]
    h = 1e-6

    @jax.jit
    def run(u):
        slope = jax.vmap(jax.grad(surrogate.relaxation))(u)
        differences = (surrogate.relaxation(u + h) - surrogate.relaxation(u - h)) / (2 * h)
        return surrogate(u), slope, differences, jax.vmap(jax.grad(lambda u: sf.spike(u, surrogate)))(u)

    got, slope, differences, slope_of_spike = run(jnp.asarray(GRID))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, formula(GRID), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(got, slope, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(got, differences, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(got, slope_of_spike, rtol=1e-15)


@pytest.mark.parametrize("name", SURROGATES)
def test_a_relaxation_is_a_step_and_relaxed_spikes_are_it(name):
    surrogate, _ = SURROGATES[name]
    relaxed = sf.Relaxed(surrogate)

    @jax.jit
    def run(u):
        value, slope = jax.vmap(jax.value_and_grad(lambda u: sf.spike(u, relaxed)))(u)
        return value, slope, surrogate.relaxation(u), surrogate(u)

    value, slope, relaxation, want_slope = run(jnp.float32([-1e6, *GRID, 1e6]))
    np.testing.assert_array_equal(value, relaxation)
    np.testing.assert_allclose(slope, want_slope, rtol=1e-6)
    assert np.ptp(value) > 0.1
    assert np.all(np.diff(value) > -1e-6) or name == "multi_gaussian"  # its slope is negative far from the threshold
    if name in AREA_ONE:
        np.testing.assert_allclose([value[0], value[-1]], [0, 1], atol=1e-6)


def cosine(u):
    return jnp.where(jnp.abs(u) < 1, 0.5 * (1 + jnp.cos(jnp.pi * u)), 0.0)


@pytest.mark.parametrize("implementation", ["scan", "interpret"])
def test_a_users_function_is_a_surrogate(implementation):
    """One step of an IF without reset: d_x = d_s cosine(u) + d_v."""
    x, d_s, d_v = np.random.default_rng(0).normal(size=(3, 150)).astype(np.float32)
    neuron = sf.IF(sf.NoReset(), cosine)

    @jax.jit
    def gradient(x, d_s, d_v):
        f = lambda x: sf.unroll(neuron, sf.IFParams(1.0), None, x, implementation=implementation)
        out, vjp = jax.vjp(f, x)
        return out[0], vjp((d_s, sf.IFState(d_v)))[0]

    s, d_x = gradient(x[None], d_s[None], d_v)
    assert_fires(s)
    assert_close(d_x[0], np.asarray(d_s * cosine(x - 1) + d_v), 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_spikes_at_exactly_the_threshold(dtype):
    tiny = float(jnp.finfo(dtype).tiny)
    u = jnp.array([0.0, -0.0, tiny, -tiny, jnp.inf, -jnp.inf, jnp.nan], dtype)
    spikes = sf.spike(u, sf.ATan())
    assert spikes.dtype == dtype
    np.testing.assert_array_equal(np.asarray(spikes, np.float32), [1, 1, 1, 0, 1, 0, 0])


@pytest.mark.parametrize("implementation", ["scan", "interpret"])
def test_a_neuron_spikes_at_exactly_its_threshold(implementation):
    xs = jnp.array([[0.75, 0.75 - 2**-20]] * 2)
    spikes, state = run(sf.IF(sf.SoftReset()), sf.IFParams(0.75), None, xs, implementation)
    np.testing.assert_array_equal(spikes, [[1, 0], [1, 1]])
    np.testing.assert_array_equal(state.v, [[0, 0.75 - 2**-19]][0])
    spikes, _ = run(sf.LIF(), sf.LIFParams(0.5, 0.75), None, jnp.array([[0.5], [0.5], [0.75]]), implementation)
    np.testing.assert_array_equal(spikes, [[0], [1], [1]])


@pytest.mark.parametrize("name", SURROGATES)
def test_huge_arguments_overflow_nowhere(name):
    surrogate, _ = SURROGATES[name]
    huge = np.float32([1e3, 1e9, 1e18, 1e19, 1e20, 1e30, 3e38])
    u = jnp.asarray(np.concatenate([-huge, huge]))

    @jax.jit
    def run(u, half):
        value, slope = jax.vmap(jax.value_and_grad(lambda u: sf.spike(u, surrogate)))(u)
        return value, slope, surrogate.relaxation(u), surrogate(half)

    value, slope, curve, half = run(u, jnp.float16([-6e4, -3.0, 3.0, 6e4]))
    np.testing.assert_array_equal(value, u > 0)
    assert np.isfinite(slope).all() and (name == "leaky_relu" or slope.max() < 1e-5)
    assert np.isfinite(curve).all() or name == "leaky_relu"  # 3e38 * 1.5 is infinite
    assert half.dtype == jnp.float16 and np.isfinite(half).all()


@pytest.mark.parametrize("name", SURROGATES)
def test_a_huge_input_leaves_every_gradient_finite(name):
    top = 1e9 if name == "leaky_relu" else 1e30  # its gradient through a hard reset grows with u, step after step
    _, params, state, xs, _ = cases.make("lif", T=5, lanes=(8,))
    xs = xs.at[2].set(jnp.clip(jnp.float32([1e30, -1e30, 1e20, -1e20, 1e12, -1e12, 1e6, 1.0]), -top, top))

    @jax.jit
    def run(params, state, xs):
        reset = sf.SoftReset() if name == "sigmoid" else sf.HardReset(-0.2)
        f = partial(sf.unroll, sf.LIF(reset, surrogate=SURROGATES[name][0]), implementation="scan")
        out, vjp = jax.vjp(f, params, state, xs)
        return out, vjp(cases.cotangents(out))

    out, gradients = run(params, state, xs)
    assert 0 < out[0].mean() < 1 and np.abs(out[1].v).max() > 1e8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))


# ---- the whole chain by finite differences

RELAXED = {  # neuron with a surrogate s: (neuron, params, scale of x)
    "if_hard": (lambda s: sf.IF(sf.HardReset(0.1), s), sf.IFParams(1.0), 1.0),
    "if_soft": (lambda s: sf.IF(sf.SoftReset(), s), sf.IFParams(1.0), 1.0),
    "lif_hard": (lambda s: sf.LIF(sf.HardReset(-0.2), False, 0.1, s), sf.LIFParams(0.7, 0.9), 1.0),
    "lif_soft": (lambda s: sf.LIF(sf.SoftReset(), True, 0.0, s), sf.LIFParams(0.7, 0.9), 3.0),
    "lif_none": (lambda s: sf.LIF(sf.NoReset(), True, 0.3, s), sf.LIFParams(0.7, 0.9), 3.0),
    "cuba": (lambda s: sf.CubaLIF(sf.HardReset(0.1), True, 0.2, s), sf.CubaLIFParams(0.6, 0.7, 0.9), 3.0),
    "adaptive": (
        lambda s: sf.AdaptiveLIF(sf.SoftReset(), True, 0.2, s),
        sf.AdaptiveLIFParams(0.8, 0.9, 0.3, 0.9),
        3.0,
    ),
    "exp": (lambda s: sf.ExpIF(surrogate=s), sf.ExpIFParams(0.5, 0.8, 1.1, 1.0), 1.0),
    "izhikevich": (lambda s: sf.Izhikevich(0.1, surrogate=s), sf.IzhikevichParams(), 10.0),
    "li": (lambda s: sf.LI(True, 0.2), sf.LIParams(0.8), 1.0),
}
CHAINS = [(name, "atan") for name in RELAXED] + [("lif_hard", s) for s in SURROGATES if not s.startswith("atan")]


@pytest.mark.parametrize(("name", "surrogate"), CHAINS)
def test_finite_differences_through_the_whole_chain(name, surrogate, x64):
    """Move each element of params, state and xs by itself. The gradient, under random cotangents on all outputs, must agree."""
    make, params, scale = RELAXED[name]
    neuron, N, T, h = make(sf.Relaxed(SURROGATES[surrogate][0])), 3, 6, 1e-5
    rng = np.random.default_rng(0)
    normal = lambda like: jnp.asarray(rng.normal(size=np.shape(like)))
    params = jax.tree.map(lambda p: p * (1 + 0.05 * normal(np.zeros(N))), params)
    start = neuron.init_state((N,))
    state = jax.tree.map(lambda v: v.astype(jnp.float64) + 0.3 * normal(v), start)
    args = params, state, scale * (normal(np.zeros((T, N))) + 0.3)
    flat, unflatten = ravel_pytree(args)
    cotangents = jax.tree.map(normal, jax.eval_shape(partial(sf.unroll, neuron, implementation="scan"), *args))

    def loss(flat):
        out = sf.unroll(neuron, *unflatten(flat), implementation="scan")
        return sum(jax.tree.leaves(jax.tree.map(lambda o, c: (o * c).sum(), out, cotangents)))

    @jax.jit
    def both(flat):
        moves = h * jnp.stack([jnp.eye(flat.size), -jnp.eye(flat.size)])
        up, down = jax.vmap(jax.vmap(lambda move: loss(flat + move)))(moves)
        return jax.grad(loss)(flat), (up - down) / (2 * h)

    got, want = both(flat)
    assert flat.size == (len(params) + len(start) + T) * N
    for a, b in zip(jax.tree.leaves(unflatten(got)), jax.tree.leaves(unflatten(want)), strict=True):
        assert np.abs(b).max() > 1e-4, "no gradient, nothing tested"
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


# ---- the equations of the literature, in NumPy float64


def after_spike(reset, u, s, threshold):
    if isinstance(reset, sf.HardReset):
        return np.where(s, reset.v_reset, u)
    return np.where(s, u - threshold, u) if isinstance(reset, sf.SoftReset) else u


def np_if(n, p, state, x):
    (v,) = state
    u = v + x
    s = u >= p.threshold
    return (after_spike(n.reset, u, s, p.threshold),), s


def np_lif(n, p, state, x):
    """An Euler step of tau dv/dt = -(v - v_rest) + x; without decay_input, x is added whole (as in snnTorch's Leaky)."""
    (v,) = state
    tau = 1 / (1 - p.decay)
    u = v - (v - n.v_rest) / tau + (x / tau if n.decay_input else x)
    s = u >= p.threshold
    return (after_spike(n.reset, u, s, p.threshold),), s


def np_cuba(n, p, state, x):
    i, v = state
    i = p.decay_syn * i + x
    (v,), s = np_lif(n, p, (v,), i)
    return (i, v), s


def np_adaptive(n, p, state, x):
    v, a = state
    raised = sf.LIFParams(p.decay, p.threshold + p.beta * a)
    (v,), s = np_lif(n, raised, (v,), x)
    return (v, a * p.decay_adapt + np.where(s, 1, 0)), s


def np_exp(n, p, state, x):
    (v,) = state
    tau = 1 / (1 - p.decay)
    u = v + (x + n.v_rest - v + p.delta * np.exp((v - p.theta) / p.delta)) / tau
    s = u >= p.threshold
    return (after_spike(n.reset, u, s, p.threshold),), s


def np_izhikevich(n, p, state, x):
    v, w = state
    dv = 0.04 * v**2 + 5 * v + 140 - w + x
    dw = p.a * (p.b * v - w)
    v, w = v + n.dt * dv, w + n.dt * dw
    s = v >= p.threshold
    return (np.where(s, p.c, v), np.where(s, w + p.d, w)), s


def np_li(n, p, state, x):
    (v,) = state
    v = p.decay * v + (1 - p.decay) * n.v_rest + ((1 - p.decay) * x if n.decay_input else x)
    return (v,), v


HARD, BELOW, SOFT, NONE = sf.HardReset(), sf.HardReset(-0.4), sf.SoftReset(), sf.NoReset()
REFERENCES = (  # neuron, NumPy step, params, scale of x, mean of x / scale
    [(sf.IF(r), np_if, sf.IFParams(1.0), 0.6, 0.1) for r in (HARD, BELOW, SOFT)]
    + [(sf.IF(NONE), np_if, sf.IFParams(1.0), 0.3, 0.0)]
    + [(sf.LIF(r, False, rest), np_lif, sf.LIFParams(0.7, 1.0), 0.8, 0.0) for r in (HARD, BELOW, SOFT, NONE) for rest in (0.0, 0.1)]
    + [(sf.LIF(r, True, rest), np_lif, sf.LIFParams(0.7, 1.0), 2.5, 0.1) for r in (HARD, BELOW, SOFT, NONE) for rest in (0.0, 0.1)]
    + [(sf.CubaLIF(r, i, rest), np_cuba, sf.CubaLIFParams(0.6, 0.7, 1.0), 2.0 if i else 0.6, 0.1) for r, i, rest in ((SOFT, False, 0.0), (BELOW, True, 0.1))]
    + [(sf.AdaptiveLIF(r, i, rest), np_adaptive, sf.AdaptiveLIFParams(0.8, 0.9, 0.3, 1.0), 3.0 if i else 0.8, 0.2) for r, i, rest in ((SOFT, False, 0.0), (BELOW, True, 0.1), (HARD, False, 0.1))]
    + [(sf.ExpIF(r, rest), np_exp, sf.ExpIFParams(0.5, 0.8, 1.2, 1.0), 1.0, 0.2) for r, rest in ((BELOW, 0.0), (SOFT, -0.1))]
    + [(sf.Izhikevich(), np_izhikevich, sf.IzhikevichParams(), 30.0, 0.6), (sf.Izhikevich(dt=0.25), np_izhikevich, sf.IzhikevichParams(0.1, 0.2, -55.0, 4.0), 40.0, 1.0)]
    + [(sf.LI(i, rest), np_li, sf.LIParams(0.8), 1.0, 0.1) for i in (False, True) for rest in (0.0, 0.2)]
)  # fmt: skip


def per_channel(params, shape, rng):
    return jax.tree.map(lambda p: p * (1 + 0.05 * rng.normal(size=shape)), params)


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda r: repr(r[0]).split(", surrogate")[0].replace(" ", ""))
def test_a_neuron_is_the_equation_of_the_literature(reference, x64):
    """25 steps from a random state; the output and the whole state must agree after each step."""
    neuron, step, params, scale, mean = reference
    rng = np.random.default_rng(1)
    xs = scale * (rng.normal(size=(25, 4, 30)) + mean)
    params = per_channel(params, (30,), rng)
    init = neuron.init_state((4, 30))
    state = tuple(np.asarray(v, np.float64) + 0.3 * rng.normal(size=v.shape) for v in init)
    as_jax = lambda tree: jax.tree.map(jnp.asarray, tree)
    (outs, states), final = run(sf.WithState(neuron), as_jax(params), type(init)(*as_jax(state)), jnp.asarray(xs))

    want_outs, want_states = [], []
    for x in xs:
        state, out = step(neuron, params, state, x)
        want_outs.append(out)
        want_states.append(state)
    if step is np_li:
        np.testing.assert_allclose(outs, want_outs, rtol=1e-12, atol=1e-12)
    else:
        assert_fires(want_outs)
        assert_same_spikes(outs, want_outs)
    for leaf, got, last in zip(range(len(init)), states, final, strict=True):
        want = np.stack([s[leaf] for s in want_states])
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11 * np.abs(want).max())
        np.testing.assert_array_equal(got[-1], last)


@pytest.mark.parametrize("name", "IF LIF CubaLIF AdaptiveLIF ExpIF Izhikevich LI".split())
def test_help_shows_the_equation_the_arguments_the_defaults_and_the_source(name):
    neuron, params = getattr(sf, name), getattr(sf, f"{name}Params")
    text = inspect.getdoc(neuron)
    assert "[t] = " in text and "https://" in text
    defaults = re.search(r"Params and their defaults[^:]*: ([^.]*(?:\.\d[^.]*)*)", text)[1]
    assert re.findall(r"(\w+) = (-?[\d.]+\d)", defaults) == [(k, str(v)) for k, v in params._field_defaults.items()]
    arguments = re.findall(r"^  (\w+): ", text, re.M)
    assert arguments == [field.name for field in dataclasses.fields(neuron)]


def test_before_the_first_step_a_neuron_is_at_rest():
    assert [float(leaf) for leaf in sf.Izhikevich().init_state(())] == [-65.0, -13.0]
    for neuron in (sf.LIF(v_rest=0.3), sf.CubaLIF(v_rest=0.3), sf.AdaptiveLIF(v_rest=0.3), sf.ExpIF(v_rest=0.3)):
        state = neuron.init_state((2, 3))
        np.testing.assert_array_equal(state.v, np.full((2, 3), 0.3, np.float32))
        assert all(leaf.shape == (2, 3) and leaf.dtype == jnp.float32 for leaf in state)
        others = [leaf for name, leaf in state._asdict().items() if name != "v"]
        assert all(not leaf.any() for leaf in others)


# ---- gradients through time by hand: resets, detach, decay_input, learned decay and threshold of every shape

RESETS = [
    sf.HardReset(),
    sf.HardReset(detach=True),
    sf.HardReset(-0.4),
    sf.HardReset(0.2, detach=True),
    sf.SoftReset(),
    sf.SoftReset(detach=True),
    sf.NoReset(),
]


def backward_by_hand(neuron, params, v0, xs, d_s, d_v):
    """(spikes, d_decay, d_threshold, d_v0, d_xs); d_decay and d_threshold have one value for each lane."""
    reset, decay, th = neuron.reset, params.decay, params.threshold
    gain = 1 - decay if neuron.decay_input else 1.0
    v, before, us, spikes = v0, [], [], []
    for x in xs:
        before.append(v)
        us.append(neuron.v_rest + decay * (v - neuron.v_rest) + gain * x)
        spikes.append(us[-1] >= th)
        v = after_spike(reset, us[-1], spikes[-1], th)
    d_decay, d_th, d_xs = 0.0, 0.0, []
    for x, v, u, s, d_spike in zip(*(a[::-1] for a in (xs, before, us, spikes, d_s)), strict=True):
        slope = 2.0 / (1 + (2 * np.pi * (u - th)) ** 2)  # ATan(4)
        attached = not getattr(reset, "detach", True)
        if isinstance(reset, sf.HardReset):
            through, by_spike, by_th = 1.0 - s, reset.v_reset - u, 0.0
        else:
            through, by_spike, by_th = (
                1.0,
                -th * isinstance(reset, sf.SoftReset),
                -1.0 * s * isinstance(reset, sf.SoftReset),
            )
        d_spike = d_spike + attached * by_spike * d_v
        d_u = through * d_v + slope * d_spike
        d_th = d_th + by_th * d_v - slope * d_spike
        d_decay = d_decay + d_u * (v - neuron.v_rest - (x if neuron.decay_input else 0.0))
        d_xs.append(gain * d_u)
        d_v = decay * d_u
    return np.stack(spikes), d_decay, d_th, d_v, np.stack(d_xs[::-1])  # fmt: skip


def summed_to(shape, d):
    padded = (1,) * (d.ndim - len(shape)) + shape
    return d.sum(tuple(i for i, n in enumerate(padded) if n == 1), keepdims=True).reshape(shape)


SHAPES = [(), (9,), (4, 1, 1), (4, 1, 9)]  # of a parameter: scalar, a channel, a batch entry, a neuron


@pytest.mark.parametrize(("i", "reset"), list(enumerate(RESETS)), ids=str)
@pytest.mark.parametrize("decay_input", [False, True])
def test_gradients_of_a_lif_by_hand(i, reset, decay_input, x64):
    neuron = sf.LIF(reset, decay_input, v_rest=0.1, surrogate=sf.ATan(4.0))
    decay_shape, threshold_shape = SHAPES[(i + decay_input) % 4], SHAPES[(2 * i + decay_input + 1) % 4]
    rng = np.random.default_rng(2)
    xs = (2.5 if decay_input else 0.9) * (rng.normal(size=(20, 4, 1, 9)) - 0.1)
    v0, d_v = rng.normal(size=(2, *xs.shape[1:]))
    d_s = rng.normal(size=xs.shape)
    params = sf.LIFParams(0.6 + 0.1 * rng.uniform(size=decay_shape), 1 + 0.1 * rng.uniform(size=threshold_shape))

    @jax.jit
    def gradients(params, v0, xs, d_s, d_v):
        out, vjp = jax.vjp(partial(sf.unroll, neuron, implementation="scan"), params, sf.LIFState(v0), xs)
        return out[0], vjp((d_s, sf.LIFState(d_v)))

    got_s, (d_params, d_state, d_xs) = gradients(*jax.tree.map(jnp.asarray, (params, v0, xs, d_s, d_v)))
    s, *want = backward_by_hand(neuron, params, v0, xs, d_s, d_v)
    assert_fires(s, high=0.45)
    assert_same_spikes(got_s, s)
    want = [summed_to(decay_shape, want[0]), summed_to(threshold_shape, want[1]), *want[2:]]
    assert_close([*map(np.asarray, d_params), np.asarray(d_state.v), np.asarray(d_xs)], want, 1e-10)
    assert all(np.abs(g).min() > 0 for g in want[:2]), "a learned parameter without a gradient"


@pytest.mark.parametrize("make", [lambda d: sf.IF(sf.SoftReset(d)), lambda d: sf.LIF(sf.HardReset(0.1, d)), lambda d: sf.AdaptiveLIF(sf.SoftReset(d)), lambda d: sf.Izhikevich(detach_reset=d)])  # fmt: skip
def test_detach_changes_gradients_and_nothing_else(make):
    name = {"IF": "if", "LIF": "lif", "AdaptiveLIF": "adaptive", "Izhikevich": "izhikevich"}[type(make(True)).__name__]
    _, params, state, xs, _ = cases.make(name)

    @jax.jit
    def outs_and_d_xs(params, state, xs):
        def one(detach):
            out, vjp = jax.vjp(lambda xs: sf.unroll(make(detach), params, state, xs, implementation="scan"), xs)
            return out, vjp(cases.cotangents(out))[0]

        return one(False), one(True)

    (kept, d_kept), (detached, d_detached) = outs_and_d_xs(params, state, xs)
    assert_fires(kept[0])
    jax.tree.map(np.testing.assert_array_equal, kept, detached)
    assert np.abs(d_kept - d_detached).max() > 1e-2 * np.abs(d_kept).max()


# ---- the temporal fusion paper, arXiv 2408.00280

DECAY, THRESHOLD = np.float32(0.2), np.float32(0.3)


def paper(rest, xs):
    """v = decay v (1 - s) + rest s + x; s = v >= threshold. (v, s) of every step, in float32."""
    v = s = np.zeros_like(xs[0])
    vs, spikes = [], []
    for x in xs:
        v = DECAY * v * (1 - s) + np.float32(rest) * s + x
        s = (v >= THRESHOLD).astype(np.float32)
        vs.append(v)
        spikes.append(s)
    return np.stack(vs), np.stack(spikes)


def paper_neuron(rest):
    return sf.LIF(sf.HardReset(v_reset=rest / float(DECAY)), surrogate=sf.Rectangle())


PAPER_PARAMS = sf.LIFParams(float(DECAY), float(THRESHOLD))


@pytest.mark.parametrize("implementation", ["scan", "interpret"])
@pytest.mark.parametrize("rest", [0.0, 0.1, -0.07])
def test_the_papers_recursion(rest, implementation):
    xs = np.random.default_rng(3).normal(0.0, 0.3, (40, 500)).astype(np.float32)
    vs, want = paper(rest, xs)
    assert_fires(want)
    (spikes, states), _ = run(sf.WithState(paper_neuron(rest)), PAPER_PARAMS, None, jnp.asarray(xs), implementation)
    assert_same_spikes(spikes, want)
    after = np.where(want == 1, np.float32(rest / float(DECAY)), vs)
    np.testing.assert_allclose(states.v, after, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("implementation", ["scan", "interpret"])
def test_the_papers_gradient(implementation):
    """First one step, dv/dv_prev = decay (1 - s - v ds/dv); then a whole sequence, where d_x[t] = d_v[t]."""
    v = np.concatenate([np.linspace(-1, 1.5, 400), [0.3]]).astype(
        np.float32
    )  # v of step 1; step 2 is far below threshold
    xs = jnp.stack([jnp.asarray(v), jnp.full_like(v, -100)])
    last_v = lambda xs: run(paper_neuron(0.0), PAPER_PARAMS, None, xs, implementation)[1].v
    (got,) = jax.jit(lambda xs, d: jax.vjp(last_v, xs)[1](d))(xs, jnp.ones_like(v))
    s = (v >= THRESHOLD).astype(np.float32)
    slope = (np.abs(v - THRESHOLD) < 0.5).astype(np.float32)
    np.testing.assert_allclose(got[0], DECAY * (1 - s - v * slope), rtol=1e-6, atol=1e-7)
    assert {tuple(pair) for pair in np.stack([s, slope], 1)} == {(0, 0), (0, 1), (1, 0), (1, 1)}

    rng = np.random.default_rng(4)
    xs, d_s = rng.normal(0.0, 0.3, (2, 40, 100)).astype(np.float32)
    vs, spikes = paper(0.0, xs)
    d_v, want = np.zeros_like(xs[0]), []
    for v, s, d in zip(vs[::-1], spikes[::-1], d_s[::-1], strict=True):
        slope = np.abs(v - THRESHOLD) < 0.5
        d_v = d * slope + d_v * DECAY * (1 - s - v * slope)
        want.append(d_v)

    @jax.jit
    def spikes_and_d_xs(xs, d_s):
        outs, vjp = jax.vjp(lambda xs: run(paper_neuron(0.0), PAPER_PARAMS, None, xs, implementation)[0], xs)
        return outs, vjp(d_s)[0]

    got, d_xs = spikes_and_d_xs(xs, d_s)
    assert_fires(spikes)
    assert_same_spikes(got, spikes)
    assert_close(d_xs, np.stack(want[::-1]), 1e-5)


@pytest.mark.parametrize(
    "neuron, params",
    [
        (sf.LIF(sf.HardReset(-0.2)), sf.LIFParams()),
        (sf.IF(), sf.IFParams()),
        (sf.LIF(surrogate=sf.Relaxed(sf.ATan())), sf.LIFParams()),
        (sf.AdaptiveLIF(), sf.AdaptiveLIFParams()),
        (sf.Izhikevich(), sf.IzhikevichParams()),
    ],
)
@pytest.mark.parametrize("implementation", ["scan", "interpret"])
def test_one_infinite_input_spikes_and_is_reset(neuron, params, implementation):
    """The reset must not compute 0 * inf. The neuron continues as after any other spike, and no gradient is NaN."""
    xs = jnp.asarray([jnp.inf] + [40.0 if isinstance(neuron, sf.Izhikevich) else 1.5] * 20)[:, None]
    run = lambda params, xs: sf.unroll(neuron, params, None, xs, implementation=implementation)
    (outs, state), vjp = jax.vjp(run, jax.tree.map(jnp.float32, params), xs)
    assert outs[0] == 1 and outs[1:].sum() >= 1
    gradients = vjp(jax.tree.map(jnp.ones_like, (outs, state)))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((state, gradients)))


def test_a_sharp_exponential_neuron_loses_no_spike():
    """With delta = 0.003 the exponential overflows, which once made the membrane NaN. The reference is float64."""
    decay, theta, delta = 0.5, 0.8, 0.003
    xs = np.asarray(2 * jax.random.normal(jax.random.key(0), (100, 200)) + 0.5)
    outs, state = sf.unroll(sf.ExpIF(), sf.ExpIFParams(decay, theta, delta, 1.0), None, jnp.asarray(xs))
    v, want = np.zeros(200), []
    for x in xs.astype(np.float64):
        u = decay * v + (1 - decay) * (delta * np.exp(np.minimum((v - theta) / delta, 600)) + x)
        want.append(u >= 1)
        v = np.where(u >= 1, -0.1, u)
    assert jnp.isfinite(state.v).all() and 0.02 < np.mean(want) < 0.6
    assert np.mean(np.asarray(outs) != np.stack(want)) < 1e-3


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, -0.2])
def test_the_reset_is_its_equation_bit_for_bit(v_reset, detach):
    """Values and gradients agree for finite inputs, and for spikes that are 0 or 1, relaxed, or graded."""
    u, s, g = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    s[:600] = np.repeat([0.0, 1.0, 2.0], 200)

    def equation(u, s):
        s = jax.lax.stop_gradient(s) if detach else s
        return (1 - s) * u + s * v_reset if v_reset else (1 - s) * u

    reset = lambda u, s: sf.HardReset(v_reset, detach)(u, s, 1.0)
    got, want = (jax.vjp(f, u, s) for f in (reset, equation))
    np.testing.assert_array_equal(got[0], want[0])
    jax.tree.map(np.testing.assert_array_equal, got[1](g), want[1](g))


@pytest.mark.parametrize("delta", [0.0, -1.0, float("inf"), float("nan"), np.array([1.0, 0.0])])
def test_an_exponential_neuron_needs_a_sharpness_above_zero(delta):
    with pytest.raises(ValueError, match="delta must be above 0 and finite; got"):
        nn.ExpIF(tau=2.0, delta=delta)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize(
    "make, name",
    [
        (lambda v: nn.LIF(tau=2.0, v_rest=v), "LIF: v_rest"),
        (lambda v: nn.CubaLIF(tau=2.0, tau_syn=2.0, reset=sf.HardReset(v)), "HardReset: v_reset"),
    ],
)
def test_a_module_needs_potentials_that_are_finite(make, name, bad):
    with pytest.raises(ValueError, match=f"{name} must be finite; got"):
        make(bad)


def test_a_field_of_ones_own_neuron_may_be_infinite():
    @dataclasses.dataclass(frozen=True)
    class Clipped(sf.LIF):
        v_max: float = float("inf")

    assert nn.Spiking(Clipped, sf.LIFParams()).neuron.v_max == float("inf")


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize(
    "make, name",
    [
        (lambda v: sf.ATan(v), "ATan: alpha"),
        (lambda v: sf.Sigmoid(v), "Sigmoid: alpha"),
        (lambda v: sf.FastSigmoid(v), "FastSigmoid: alpha"),
        (lambda v: sf.Gaussian(v), "Gaussian: alpha"),
        (lambda v: sf.PiecewiseQuadratic(v), "PiecewiseQuadratic: alpha"),
        (lambda v: sf.Rectangle(v), "Rectangle: width"),
        (lambda v: sf.Triangle(width=v), "Triangle: width"),
        (lambda v: nn.Izhikevich(dt=v), "Izhikevich: dt"),
        (lambda v: nn.Izhikevich(scale=v), "Izhikevich: scale"),
    ],
)
def test_a_scale_that_is_not_above_zero_is_refused(make, name, bad):
    with pytest.raises(ValueError, match=f"{name} must be above 0 and finite; got {bad}"):
        make(bad)
