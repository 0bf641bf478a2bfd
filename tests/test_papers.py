"""Neurons of papers: each is its paper's equation in NumPy, its gradient is that of finite differences, and it fuses."""

import dataclasses
import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_fires
from test_recurrent import why_not

import snnfuse as sf
from snnfuse import nn, papers

NAMES = "AdLIF SEAdLIF RF BRF TCLIF GLIF CLIF KLIF QuadraticIF ILIF TernaryLIF".split()
T, LANES = 40, 6
sigmoid = lambda z: 1 / (1 + np.exp(-z))


# The equations in the papers' own order and words; each yields the spikes of a step.


def adlif(p, xs):
    u = w = s = np.zeros(LANES)
    for x in xs:
        new = p["decay"] * u + (1 - p["decay"]) * (x - w)
        w = p["decay_adapt"] * w + (1 - p["decay_adapt"]) * 120 * (p["a"] * u + p["b"] * s)
        s = (new >= p["threshold"]) * 1.0
        u = new * (1 - s)
        yield s


def seadlif(p, xs):
    u = w = np.zeros(LANES)
    for x in xs:
        u = p["decay"] * u + (1 - p["decay"]) * (x - w)
        s = (u >= p["threshold"]) * 1.0
        u = u * (1 - s)
        w = p["decay_adapt"] * w + (1 - p["decay_adapt"]) * 120 * (p["a"] * u + p["b"] * s)
        yield s


def rf(p, xs):
    z = np.zeros(LANES, complex)
    for x in xs:
        z = z + 0.01 * ((p["b"] + 1j * p["omega"]) * z + x)
        yield (z.real >= p["threshold"]) * 1.0


def brf(p, xs):
    z, q = np.zeros(LANES, complex), np.zeros(LANES)
    for x in xs:
        b = (-1 + np.sqrt(1 - (0.01 * p["omega"]) ** 2)) / 0.01 - p["b_offset"] - q
        z = z + 0.01 * ((b + 1j * p["omega"]) * z + x)
        s = (z.real - p["threshold"] - q >= 0) * 1.0
        q = 0.9 * q + s
        yield s


def tclif(p, xs):
    v1 = v2 = np.zeros(LANES)
    for x in xs:
        v1 = v1 + p["beta1"] * v2 + x
        v2 = v2 + p["beta2"] * v1
        s = (v2 >= p["threshold"]) * 1.0
        v1, v2 = v1 - p["gamma"] * s, v2 - p["threshold"] * s
        yield s


def glif(p, xs):
    u = s = np.zeros(LANES)
    for x in xs:
        current = x * (1 - p["beta"] * (1 - p["conductance"]))
        kept = (1 - p["alpha"] * (1 - p["decay"])) * u * (1 - p["gamma"] * s) - (1 - p["alpha"]) * p["leak"]
        u = kept + current - (1 - p["gamma"]) * p["v_drop"] * s
        s = (u >= p["threshold"]) * 1.0
        yield s


def clif(p, xs):
    v = m = np.zeros(LANES)
    for x in xs:
        u = p["decay"] * v + x
        s = (u >= p["threshold"]) * 1.0
        m = m * sigmoid((1 - p["decay"]) * u) + s
        v = u - s * (p["threshold"] + sigmoid(m))
        yield s


def klif(p, xs):
    v = np.zeros(LANES)
    for x in xs:
        f = np.maximum(p["k"] * (v + (1 - p["decay"]) * (x - v)), 0)
        s = (f >= p["threshold"]) * 1.0
        v = f * (1 - s)
        yield s


def quadraticif(p, xs):
    v = np.zeros(LANES)
    for x in xs:
        u = v + (1 - p["decay"]) * (x + p["a"] * v * (v - p["v_critical"]))
        s = (u >= p["threshold"]) * 1.0
        v = u * (1 - s) - 0.1 * s
        yield s


def ilif(p, xs):
    u = s = np.zeros(LANES)
    for x in xs:
        u = p["decay"] * (u - s * p["threshold"]) + x
        s = np.clip(np.round(u / p["threshold"]), 0, 4)
        yield s


def ternarylif(p, xs):
    v = np.zeros(LANES)
    for x in xs:
        u = p["decay"] * v + x
        s = np.where(np.abs(u) >= p["threshold"], np.sign(u), 0)
        v = np.where(s == 0, u, 0)
        yield s


SCALE = dict(AdLIF=12.0, SEAdLIF=12.0, RF=25.0, BRF=100.0, TCLIF=0.4, CLIF=1.0, KLIF=2.5, QuadraticIF=2.0)
CHANGED = dict(  # other values than the defaults, so that no parameter is left out by chance
    AdLIF=dict(decay_adapt=0.97, a=0.4, b=1.3), SEAdLIF=dict(decay_adapt=0.97, a=0.4, b=1.3), RF=dict(omega=12.0, b=-1.5),
    BRF=dict(omega=12.0, b_offset=0.5), TCLIF=dict(beta1=-0.3, beta2=0.4), GLIF=dict(alpha=0.7, v_drop=0.4),
    CLIF=dict(decay=0.6), KLIF=dict(k=1.2, decay=0.6), QuadraticIF=dict(a=0.7, v_critical=0.6), ILIF=dict(decay=0.4),
    TernaryLIF=dict(decay=0.4),
)  # fmt: skip


def make(name, steps=T):
    """(neuron, params, xs): float64 where JAX has it."""
    neuron, params = getattr(papers, name), getattr(papers, f"{name}Params")
    rng = np.random.default_rng(NAMES.index(name))
    xs = SCALE.get(name, 1.0) * (rng.normal(size=(steps, LANES)) + 0.5)
    return neuron(), params(**CHANGED[name])._replace(threshold=params().threshold * 1.1), xs


@pytest.mark.parametrize("name", NAMES)
def test_a_neuron_is_its_papers_equation(name):
    neuron, params, xs = make(name)
    with jax.enable_x64(True):
        got = jax.jit(partial(sf.unroll, neuron, params, None, implementation="scan"))(jnp.asarray(xs))[0]
    want = np.stack(list(globals()[name.lower()](params._asdict(), xs)))
    assert_fires(want != 0, high=0.6)
    np.testing.assert_array_equal(got, want)
    if name in ("ILIF", "TernaryLIF"):
        assert {*np.unique(want)} == ({0, 1, 2, 3} if name == "ILIF" else {-1, 0, 1})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ILIF"])  # its gradient is tested below
def test_its_gradient_is_that_of_finite_differences(name):
    neuron, params, xs = make(name, 6)
    neuron = dataclasses.replace(neuron, surrogate=sf.Relaxed(sf.ATan()))
    if hasattr(neuron, "reset"):
        neuron = dataclasses.replace(neuron, reset=dataclasses.replace(neuron.reset, detach=False))
    with jax.enable_x64(True):
        weights = jnp.asarray(np.random.default_rng(9).normal(size=xs.shape))
        f = jax.jit(lambda p, xs: (sf.unroll(neuron, p, None, xs, implementation="scan")[0] * weights).sum())
        params, xs = jax.tree.map(jnp.float64, params), jnp.asarray(xs) / 4
        grads, h = jax.jit(jax.grad(f, (0, 1)))(params, xs), 1e-6
        for field in params._fields:
            near = [f(params._replace(**{field: getattr(params, field) + d}), xs) for d in (h, -h)]
            np.testing.assert_allclose(getattr(grads[0], field), (near[0] - near[1]) / (2 * h), rtol=1e-5, atol=1e-7)
        for at in ((0, 0), (3, 2), (5, 5)):
            near = [f(params, xs.at[at].add(d)) for d in (h, -h)]
            np.testing.assert_allclose(grads[1][at], (near[0] - near[1]) / (2 * h), rtol=1e-5, atol=1e-7)


def test_the_gradient_of_integer_spikes_is_one_between_their_ends():
    run = lambda x: sf.unroll(papers.ILIF(), papers.ILIFParams(threshold=0.5), None, x, implementation="scan")[0].sum()
    xs = jnp.array([[-0.1, 0.1, 0.3, 1.9, 2.1]])
    np.testing.assert_array_equal(jax.grad(run)(xs), [[0, 2, 2, 2, 0]])
    with pytest.raises(ValueError, match="ILIF: levels must be a whole number; got 2.5"):
        papers.ILIF(levels=2.5)


@pytest.mark.filterwarnings("ignore:neuron BinaryILIF")  # it has no gradient
@pytest.mark.parametrize("implementation", ["scan", "interpret"])
def test_integer_spikes_are_binary_steps_when_deployed(implementation):
    """Two layers: the graded network, and the one that sends `levels` binary spikes for each step, added up after the weights."""
    params, weight = papers.ILIFParams(decay=0.4), jax.random.normal(jax.random.key(1), (LANES, 7))
    xs = 2 * jax.random.normal(jax.random.key(0), (9, LANES)) + 1
    run = lambda neuron, xs: sf.unroll(neuron, params, None, xs, implementation=implementation)
    graded, state = run(papers.ILIF(3), xs)
    binary, binary_state = run(papers.BinaryILIF(3), xs)
    assert all(set(np.unique(s)) == {0, 1} for s in binary) and set(np.unique(graded)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(sum(binary), graded)
    np.testing.assert_allclose(binary_state.v, state.v, atol=1e-5)
    later, _ = run(papers.ILIF(3), graded @ weight)
    deployed, _ = run(papers.BinaryILIF(3), sum(s @ weight for s in binary))
    np.testing.assert_array_equal(sum(deployed), later)


def test_levels_of_a_quantised_relu_are_rates_of_integrate_and_fire():
    """Over T = levels steps of one current. Its gradient is 1 / threshold between 0 and the threshold; the kernels agree."""
    x = jnp.array([-3.0, -0.1, 0.1, 0.26, 0.5, 0.7, 0.99, 1.3, 9.0]) * 2

    def run(how, x, **choices):
        return sf.unroll(papers.QCFS(**choices), papers.QCFSParams(2.0), None, x[None], implementation=how)[0][0]

    for how in ("scan", "interpret"):
        spikes, _ = sf.unroll(sf.IF(reset=sf.SoftReset()), sf.IFParams(2.0), None, jnp.tile(x, (5, 1)))
        np.testing.assert_allclose(run(how, x, levels=5, shift=0.0), spikes.mean(0))
        np.testing.assert_allclose(run(how, x, levels=2) * 2, [0, 0, 0, 1, 1, 1, 2, 2, 2])
        graded, _ = sf.unroll(papers.ILIF(5), papers.ILIFParams(threshold=2 / 5), None, x[None])
        np.testing.assert_allclose(run(how, x, levels=5) * 5, graded[0], rtol=1e-6)
        slope = jax.grad(lambda x, how=how: run(how, x).sum())(x)
        np.testing.assert_allclose(slope, np.where((x >= 0) & (x <= 2), 0.5, 0))
    with pytest.raises(ValueError, match="QCFS: levels must be a whole number; got 2.5"):
        papers.QCFS(levels=2.5)


@pytest.mark.parametrize("name", ["ILIF", "TernaryLIF"])
def test_graded_spikes_can_be_fed_back_by_scan_alone(name):
    neuron, params, xs = make(name)
    xs, weight = jnp.asarray(xs, jnp.float32), 0.1 * jnp.eye(LANES)
    outs, _ = sf.unroll_recurrent(neuron, params, None, xs, weight=weight, implementation="scan")
    assert not np.array_equal(outs, sf.unroll(neuron, params, None, xs)[0])
    assert "the output that feeds back is not always 0 or 1" in why_not(neuron, params, LANES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "implementation", ["interpret", *(pytest.param(n, marks=pytest.mark.gpu) for n in ("pallas", "triton"))]
)
def test_it_fuses(name, implementation):
    neuron, params, xs = make(name, 9 if implementation == "interpret" else 100)
    params, xs = jax.tree.map(jnp.float32, params), jnp.asarray(xs, jnp.float32)
    weights = jnp.asarray(np.random.default_rng(9).normal(size=xs.shape), jnp.float32)

    @partial(jax.jit, static_argnums=2)
    def run(params, xs, how):
        outs, vjp = jax.vjp(lambda p, xs: sf.unroll(neuron, p, None, xs, implementation=how)[0], params, xs)
        return outs, vjp(weights)

    (outs, grads), (want, want_grads) = run(params, xs, implementation), run(params, xs, "scan")
    np.testing.assert_array_equal(outs, want)
    assert float(outs.mean()) > 0.01
    assert_close(grads[1], want_grads[1], 1e-4)
    scale = max(abs(float(g)) for g in want_grads[0])  # each is a sum over all lanes and steps, which may cancel
    np.testing.assert_allclose(grads[0], want_grads[0], rtol=1e-4, atol=1e-5 * scale)


def test_an_oscillator_too_fast_for_its_step_is_refused():
    with pytest.raises(ValueError, match="BRF: omega must be below 1 / dt = 100; got 120"):
        sf.unroll(papers.BRF(), papers.BRFParams(omega=120.0), None, jnp.ones((2, 3)))


def test_all_of_them_are_tested_and_documented():
    found = [n for n, c in vars(papers).items() if dataclasses.is_dataclass(c)]
    assert sorted(found) == sorted([*NAMES, "BinaryILIF", "QCFS"])  # these two have tests of their own
    for name in [*NAMES, "QCFS"]:
        neuron, params = getattr(papers, name), getattr(papers, f"{name}Params")
        text = inspect.getdoc(neuron)
        assert "[t] = " in text and "https://" in text
        defaults = re.search(r"Params and their defaults: ([^.]*(?:\.\d[^.]*)*)", text)[1]
        assert re.findall(r"(\w+) = (-?[\d.]+\d)", defaults) == [(k, str(v)) for k, v in params._field_defaults.items()]
        assert re.findall(r"^  (\w+): ", text, re.M) == [field.name for field in dataclasses.fields(neuron)]


def test_a_neuron_of_a_paper_is_a_layer():
    layer = nn.Spiking(papers.SEAdLIF, papers.SEAdLIFParams(decay=0.9), learn=("a", "b"), shape=(4,), scale=60.0)
    outs, state = layer(12 * jax.random.normal(jax.random.key(0), (20, 3, 4)))
    assert_fires(outs)
    assert layer.a.shape == (4,) and state.w.shape == (3, 4) and layer.neuron.scale == 60
