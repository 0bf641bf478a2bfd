"""NIR: graphs that other simulators exported give their spikes here, and graphs that we export give our spikes there."""

import dataclasses
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_fires, assert_same_spikes
from flax import nnx

import snnfuse as sf
from snnfuse import nn
from snnfuse.interop import nir as interop
from snnfuse.models import Residual, resnet, spiking_resnet
from snnfuse.nn import monitor

nir = pytest.importorskip("nir")

GOLDEN = Path(__file__).parent / "golden" / "nir"
RUNS = dict(np.load(GOLDEN / "runs.npz"))
CASES = json.loads(str(RUNS["cases"]))
GRID = interop.Dialect(dt=0.5)  # a power of two: nothing is rounded


run = nnx.jit(lambda model, xs: model(xs)[0])


def last(x):
    return np.moveaxis(x, 2, -1) if x.ndim > 3 else x


def inputs(*shape, T=16, B=3, seed=0, scale=1.5):
    return 0.4 + scale * jax.random.normal(jax.random.key(seed), (T, B, *shape))


def dialect_of(case):
    change = {k: tuple(v) if isinstance(v, list) else v for k, v in CASES[case]["change"].items()}
    return dataclasses.replace(getattr(interop, CASES[case]["dialect"]), **change)


# From there.


@pytest.mark.parametrize("case", CASES)
def test_what_others_exported_runs_with_their_spikes(case):
    model = interop.from_nir(GOLDEN / f"{case}.nir", dialect_of(case))
    want = RUNS[f"{case}/y"]
    got, _ = model(last(RUNS[f"{case}/x"]))
    if want.dtype == np.uint8:
        assert 0.02 < want.mean() < 0.6
        np.testing.assert_array_equal(np.asarray(got), want)
    else:
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_the_dialect_matters():
    """A golden file that passes with any dialect would test nothing."""
    xs = RUNS["snntorch_leaky/x"]
    for dialect in (interop.NIR, dataclasses.replace(interop.SNNTORCH, reset="soft")):
        got, _ = interop.from_nir(GOLDEN / "snntorch_leaky.nir", dialect)(xs)
        assert (np.asarray(got) != RUNS["snntorch_leaky/y"]).mean() > 0.01
    with pytest.raises(
        ValueError, match="time constants must be at least dt = 0.001; got 0.0005. Is dt of another unit"
    ):
        interop.from_nir(GOLDEN / "snntorch_leaky.nir", interop.Dialect(dt=1e-3))


def step_by_the_book(node, xs, dt):
    """NIR's equations, forward Euler, numpy, in NIR's layout [T, B, C, H, W]."""
    cuba = type(node).__name__.startswith("Cuba")
    v = np.zeros(xs.shape[1:]) + getattr(node, "v_leak", 0)
    i, outs = 0.0, []
    for x in xs.astype(np.float64):
        if cuba:
            i = i + dt / node.tau_syn * (-i + node.w_in * x)
            x = i
        if tau := {"tau", "tau_mem"} & set(vars(node)):
            v = v + dt / getattr(node, tau.pop()) * (node.v_leak - v + node.r * x)
        else:
            v = v + dt * node.r * x
        outs.append(v)
        if hasattr(node, "v_threshold"):
            s = v > node.v_threshold
            v = np.where(s, node.v_reset, v)
            outs[-1] = s
    return np.stack(outs)


SHAPE = (2, 4, 3)
rng = np.random.default_rng(0)
some = lambda low, high: rng.uniform(low, high, SHAPE)
full = partial(np.full, SHAPE)
firing = dict(v_threshold=some(0.8, 1.2), v_reset=full(-0.1))
leaking = dict(r=some(1, 3), v_leak=full(0.1))
NODES = {
    "IF": nir.IF(r=some(1, 2), **firing),
    "I": nir.I(r=some(0.5, 1)),
    "LIF": nir.LIF(tau=some(1, 2), **leaking, **firing),
    "LI": nir.LI(tau=some(1, 2), **leaking),
    "CubaLIF": nir.CubaLIF(tau_syn=some(1, 2), tau_mem=some(1, 3), w_in=some(1, 2), **leaking, **firing),
    "CubaLI": nir.CubaLI(tau_syn=some(1, 2), tau_mem=some(1, 3), w_in=some(1, 2), **leaking),
}


@pytest.mark.parametrize("kind", NODES)
def test_neurons_with_parameters_of_their_own(kind):
    """Every neuron has its own parameter, [C, H, W]; compared with NIR's equations."""
    node, xs = NODES[kind], np.asarray(inputs(*SHAPE))
    model = interop.from_nir(nir.NIRGraph.from_list(node), dataclasses.replace(interop.NIR, dt=0.5))
    want = last(step_by_the_book(node, xs, dt=0.5))
    got, _ = model(last(xs))
    if want.dtype == bool:
        assert_fires(want)
        np.testing.assert_array_equal(np.asarray(got), want)
    else:
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_other_nodes():
    xs = np.asarray(inputs(2, 4, 6))
    scale = some(0.5, 2)
    pools = {"SumPool2d": 1, "AvgPool2d": 1 / 6}
    for pool, factor in pools.items():
        threshold = factor * rng.uniform(3, 8, (2, 2, 3))
        nodes = [
            nir.Scale(np.concatenate([scale, scale], 2)),
            getattr(nir, pool)(np.array([2, 3]), np.array([2, 2]), np.array([0, 1])),
            nir.Threshold(threshold),
            nir.Flatten({"input": np.array([2, 2, 3])}, 1, -1),  # [C, H W]
        ]
        model = interop.from_nir(nir.NIRGraph.from_list(nir.Input(np.array([2, 4, 6])), *nodes), interop.NIR)
        x = np.pad(xs * nodes[0].scale, [(0, 0)] * 4 + [(1, 1)])
        windows = np.lib.stride_tricks.sliding_window_view(x, (2, 3), (3, 4))[..., ::2, ::2, :, :].sum((-1, -2))
        want = (windows * factor > threshold).reshape(*windows.shape[:3], -1)
        assert_fires(want)
        np.testing.assert_array_equal(np.asarray(model(last(xs))[0]), last(want))


def test_firing_at_or_above():
    """NIR fires above the threshold; SpikingJelly and sinabs also fire at it. On a grid of inputs they differ in every spike."""
    node = nir.IF(r=np.full(1, 2.0), v_threshold=np.ones(1))
    xs = jnp.full((6, 1, 1), 0.5)
    above, _ = interop.from_nir(nir.NIRGraph.from_list(node), GRID)(xs)
    at, _ = interop.from_nir(nir.NIRGraph.from_list(node), dataclasses.replace(GRID, fires=">="))(xs)
    assert above.ravel().tolist() == [0, 0, 1, 0, 0, 1] and at.ravel().tolist() == [0, 1, 0, 1, 0, 1]


def test_connections_that_skip():
    """y = LIF(W2 s + s + x), s = LIF(W1 x): edges into a node are summed; in pieces as in whole; subgraphs are opened."""
    weights = [nir.Linear(0.5 * rng.normal(size=(5, 5))) for _ in range(2)]
    lif = lambda: nir.LIF(np.full(5, 2e-4), np.ones(5), np.zeros(5), np.full(5, 0.9))
    inner = nir.NIRGraph.from_list(weights[0], lif())
    nodes = {"in": nir.Input([5]), "w2": weights[1], "lif": lif(), "out": nir.Output([5]), "first": inner}
    edges = [("in", "first"), ("first", "w2"), ("w2", "lif"), ("first", "lif"), ("in", "lif"), ("lif", "out")]
    model = interop.from_nir(nir.NIRGraph(nodes, edges), interop.NIR)
    assert isinstance(model, interop.Graph)
    xs = inputs(5)
    neuron = nn.LIF(tau=2.0, decay_input=True, threshold=float(np.nextafter(np.float32(0.9), 1)))
    s, _ = neuron(xs @ weights[0].weight.T.astype(np.float32))
    want, _ = neuron(s @ weights[1].weight.T.astype(np.float32) + s + xs)
    whole, end = model(xs)
    assert_fires(want)
    assert_same_spikes(whole, want)
    first, state = model(xs[:7], model.init_state(xs))
    second, state = model(xs[7:], state)
    assert_same_spikes(jnp.concatenate([first, second]), whole)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state, end))
    again = interop.from_nir(interop.to_nir(model, (5,)), interop.NIR)
    assert_same_spikes(again(xs)[0], whole)
    with pytest.raises(ValueError, match="state must have 2 entries, one per Temporal layer; got 1"):
        model(xs, state[:1])


def test_a_model_from_there_learns():
    model = interop.from_nir(GOLDEN / "spikingjelly_conv.nir", interop.SPIKINGJELLY, surrogate=sf.Sigmoid())
    xs = last(RUNS["spikingjelly_conv/x"])
    gradients = nnx.jit(nnx.grad(lambda model: model(xs)[0].mean()))(model)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradients)) and len(jax.tree.leaves(gradients)) == 6


# From here.


def convnet(reset=sf.HardReset()):  # noqa: B008
    rngs = nnx.Rngs(1)
    norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
    norm.mean[...], norm.var[...] = jnp.linspace(-0.3, 0.2, 4), jnp.linspace(0.5, 2, 4)
    norm.scale[...], norm.bias[...] = jnp.linspace(0.7, 1.5, 4), jnp.linspace(-0.1, 0.3, 4)
    return nn.Sequential(
        nnx.Conv(2, 4, (5, 3), strides=(2, 1), use_bias=False, rngs=rngs),  # SAME: rows are padded by 1 and 2
        norm,
        nn.ParametricLIF(tau=2.0, shape=(4,), learn=("threshold",), threshold=jnp.linspace(0.2, 0.5, 4), reset=reset),
        partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2)),
        nnx.Conv(4, 4, (3, 3), kernel_dilation=(1, 2), feature_group_count=2, rngs=rngs),
        nn.LIF(decay=jnp.linspace(0.3, 0.8, 4), threshold=0.3, reset=reset),
        nn.flatten,
        interop.Scale(jnp.linspace(0.5, 2, 24)),
        nn.IF(threshold=0.4, reset=reset),
        nn.Sequential(nnx.Linear(24, 7, rngs=rngs), nn.CubaLIF(tau_syn=1.5, tau=3.0, threshold=0.3, reset=reset)),
    )


def line():
    return nn.Sequential(
        nnx.Conv(2, 6, 4, strides=2, padding=((2, 0),), rngs=nnx.Rngs(0)),
        nn.IF(threshold=0.7),
        nn.flatten,
        nnx.Linear(30, 5, use_bias=False, rngs=nnx.Rngs(1)),
        nn.LI(tau=3.0, decay_input=True, v_rest=0.1),
    )


@pytest.mark.parametrize("name", ["NIR", "SPIKINGJELLY", "NORSE", "SINABS"])
def test_there_and_back(name, tmp_path):
    dialect = getattr(interop, name)
    model = convnet(sf.SoftReset() if dialect.reset == "soft" else sf.HardReset())
    xs = inputs(8, 6, 2)
    nir.write(tmp_path / "model.nir", interop.to_nir(model, (8, 6, 2), dialect))
    again = interop.from_nir(tmp_path / "model.nir", dialect)
    want, got = run(model, xs), run(again, xs)
    assert_fires(want)
    np.testing.assert_array_equal(got, want)


def test_there_and_back_along_a_line():
    xs = inputs(11, 2)
    graph = interop.to_nir(line(), (11, 2))
    assert [type(n).__name__ for n in graph.nodes.values()] == "Input Conv1d IF Flatten Linear LI Output".split()
    np.testing.assert_allclose(interop.from_nir(graph, interop.NIR)(xs)[0], line()(xs)[0], atol=1e-5)


@pytest.mark.parametrize("connect", ["sum", "add"])
def test_there_and_back_with_residual_blocks(connect):
    """Normalisation is folded into the weights, which rounds sums differently. Spikes may differ; in this case none does."""
    rngs = nnx.Rngs(0)
    norm = lambda: nn.BatchNorm(4, gain=1.5, rngs=rngs)
    block = Residual(
        nn.Sequential(
            nn.Conv(2, 4, (3, 3), rngs=rngs),
            nn.NormSpiking(nn.LIF(tau=2.0), norm()),
            nn.Conv(4, 4, (3, 3), 2, padding=1, rngs=rngs),
        ),
        nn.NormSpiking(nn.IF(), norm(), connect=connect, shortcut_norm=norm() if connect == "sum" else None),
        nn.Sequential(nn.Conv(2, 4, (1, 1), 2, rngs=rngs)),
    )
    head = nn.Linear(4, 3, bias_init=nnx.initializers.uniform(0.3), rngs=rngs)
    model = nn.Sequential(nn.Remat(block), nn.PackSpikes(), nn.mean_pool, head, nn.IF(threshold=0.3))
    xs = inputs(6, 8, 2)
    run(model, xs)  # in training, for statistics
    model.eval()
    want = run(model, xs)
    assert_fires(want)
    np.testing.assert_array_equal(run(interop.from_nir(interop.to_nir(model, (6, 8, 2)), interop.NIR), xs), want)


@pytest.mark.parametrize("shape", [(3,), (5, 2), (4, 6, 2)])
def test_there_and_back_with_normalised_inputs_and_spikes(shape):
    norm = lambda: nn.BatchNorm(shape[-1], gain=1.5, rngs=nnx.Rngs(0))
    model = nn.Sequential(norm(), nn.IF(), norm(), nn.LIF(tau=2.0))
    xs = inputs(*shape)
    run(model, xs)  # in training, for statistics
    model.eval()
    want = run(model, xs)
    assert_fires(want)
    np.testing.assert_array_equal(run(interop.from_nir(interop.to_nir(model, shape, GRID), GRID), xs), want)


def test_there_and_back_with_a_membrane_shortcut(monkeypatch):
    """The currents of two blocks are added to those of the stem; the third block has a convolution as its shortcut."""
    monkeypatch.setattr(resnet, "WIDTHS", (8, 8))
    monkeypatch.setitem(resnet.DEPTHS, 18, (2, 1))
    model = spiking_resnet(
        18, 2, 3, connect="membrane", stem="cifar", neuron=partial(nn.IF, threshold=0.5), rngs=nnx.Rngs(0)
    )
    xs = inputs(8, 8, 2, T=6)
    run(model, xs)  # in training, for statistics
    model.eval()
    graph = interop.to_nir(model, (8, 8, 2), GRID)
    again, want = interop.from_nir(graph, GRID), run(model, xs)
    assert float(jnp.abs(want).max()) > 0.1
    np.testing.assert_allclose(run(again, xs), want, atol=1e-3)


def test_there_and_back_late():
    model = interop.from_nir(GOLDEN / "snntorch_synaptic.nir", interop.SNNTORCH)
    again = interop.from_nir(interop.to_nir(model, (12,), interop.SNNTORCH), interop.SNNTORCH)
    np.testing.assert_array_equal(again(RUNS["snntorch_synaptic/x"])[0], RUNS["snntorch_synaptic/y"])


# Into the other packages, where they are installed.


def dense(neuron):
    rngs = nnx.Rngs(3)
    layers = [nnx.Linear(6, 16, rngs=rngs), neuron(), nnx.Linear(16, 8, use_bias=False, rngs=rngs), neuron()]
    for linear in layers[::2]:
        linear.kernel[...] *= 3
    return nn.Sequential(*layers)


elsewhere = pytest.mark.filterwarnings("ignore")  # warnings of the other libraries are not ours to mend


def channels_first(xs):
    return np.array(np.moveaxis(xs, -1, 2))


@elsewhere
@pytest.mark.parametrize("kind", ["lif", "lif_out", "if", "cuba", "conv"])
def test_ours_in_spikingjelly(kind):
    torch = pytest.importorskip("torch")
    exchange = pytest.importorskip("spikingjelly.activation_based.nir_exchange")
    models = {
        "lif": dense(partial(nn.LIF, tau=2.0, decay_input=True, threshold=0.4)),
        "lif_out": dense(partial(nn.LIF, tau=2.0)),
        "if": dense(nn.IF),
        "cuba": dense(partial(nn.CubaLIF, decay_syn=0.3, tau=2.0, threshold=1.5)),
        "conv": nn.Sequential(
            nnx.Conv(2, 4, (5, 5), strides=2, rngs=nnx.Rngs(0)),
            nn.LIF(tau=2.0, threshold=0.7),
            nn.flatten,
            nnx.Linear(48, 7, rngs=nnx.Rngs(1)),
            nn.IF(threshold=0.4),
        ),
    }
    xs = np.asarray(inputs(8, 6, 2) if kind == "conv" else inputs(6))
    graph = interop.to_nir(models[kind], xs.shape[2:], interop.SPIKINGJELLY)
    net = exchange.import_from_nir(graph, step_mode="m")
    want = models[kind](xs)[0]
    assert_fires(want)
    with torch.no_grad():
        got = net(torch.from_numpy(channels_first(xs) if kind == "conv" else xs))[0].numpy()
    np.testing.assert_array_equal(got, want)


def snntorch_of(model):
    return pytest.importorskip("snntorch.import_nir").import_from_nir(interop.to_nir(model, (6,)))


def norse_of(model):
    graph = interop.to_nir(model, (6,), interop.Dialect(dt=1e-3, jumps=("IF",)))
    return pytest.importorskip("norse.torch.utils.import_nir").from_nir(graph, dt=1e-3)


@elsewhere
@pytest.mark.parametrize(
    "net_of, count, neuron",
    [
        (snntorch_of, 2, partial(nn.LIF, tau=4.0)),
        (snntorch_of, 2, partial(nn.CubaLIF, decay_syn=0.3, tau=2.0, threshold=2.0)),
        (norse_of, 4, partial(nn.LIF, tau=2.0, decay_input=True, threshold=0.4)),
        (norse_of, 4, nn.IF),
        (norse_of, 4, partial(nn.CubaLIF, decay_syn=0.3, tau=2.0, decay_input=True, threshold=0.6)),
    ],
)
def test_ours_in_what_steps(net_of, count, neuron):
    """snnTorch and Norse run one step at a time, and take and return the state."""
    torch = pytest.importorskip("torch")
    model, xs = nn.Sequential(*dense(neuron).layers[:count]), np.asarray(inputs(6))
    net, want = net_of(model), model(xs)[0]
    assert_fires(want)
    state, got = None, []
    with torch.no_grad():
        for x in torch.from_numpy(xs):
            out, state = net(x, state)
            got.append(out.numpy())
    np.testing.assert_array_equal(np.stack(got), want)


@elsewhere
def test_ours_in_sinabs():
    """Its importer lets LIF spike several times in a step. It equals ours while no membrane reaches twice the threshold."""
    torch = pytest.importorskip("torch")
    sinabs = pytest.importorskip("sinabs.nir")
    rngs = nnx.Rngs(0)
    lif = nn.LIF(decay=0.7, threshold=0.8, reset=sf.SoftReset())
    model = nn.Sequential(nnx.Linear(6, 16, rngs=rngs), lif, nnx.Linear(16, 3, rngs=rngs), nn.LI(decay=0.6))
    model.layers[0].kernel[...] *= 0.4
    xs = np.asarray(inputs(6, scale=0.5))
    (spikes, states), _ = lif.trace(model.layers[0](xs))
    assert_fires(spikes)
    assert states.v.max() < 0.8, "as much is left of v after a spike as makes another"
    graph = interop.to_nir(model, (6,), dataclasses.replace(interop.SINABS, jumps=("LIF", "LI")))
    net = sinabs.from_nir(graph, batch_size=xs.shape[1])
    with torch.no_grad():
        got = net(torch.from_numpy(np.array(xs.swapaxes(0, 1)).reshape(-1, 6)))[0].numpy()
    np.testing.assert_allclose(got.reshape(xs.shape[1], -1, 3).swapaxes(0, 1), model(xs)[0], atol=1e-5)


# Loops.


def loop_of(kind, bias):
    """A recurrent neuron in a subgraph, as snnTorch exports it, between two layers; and its own nodes."""
    fields = dict(v_threshold=np.full(6, 0.9), v_leak=np.zeros(6), r=np.linspace(1, 2, 6), v_reset=np.zeros(6))
    if kind == "LIF":
        neuron = nir.LIF(tau=np.full(6, 1.5), **fields)
    else:
        neuron = nir.CubaLIF(tau_syn=np.full(6, 1.0), tau_mem=np.full(6, 1.5), w_in=np.full(6, 1.5), **fields)
    draw = np.random.default_rng(3)
    w = draw.integers(-64, 65, (6, 6)) / 64
    back = nir.Affine(w, draw.normal(size=6) / 4) if bias else nir.Linear(w)
    nodes = {"input": nir.Input([6]), "lif": neuron, "w_rec": back, "output": nir.Output([6])}
    edges = [("input", "lif"), ("lif", "w_rec"), ("w_rec", "lif"), ("lif", "output")]
    inner = nir.NIRGraph(nodes, edges, type_check=False)
    outer = {"in": nir.Input([6]), "rnn": inner, "out": nir.Output([6])}
    return nir.NIRGraph(outer, [("in", "rnn"), ("rnn", "out")], type_check=False), neuron, back


def loop_by_the_book(node, back, xs, dt):
    """`step_by_the_book` for a neuron with feedback: each step runs again on all inputs up to it."""
    fed, s = [], np.zeros(xs.shape[1:])
    for x in xs.astype(np.float64):
        fed.append(x + s @ back.weight.T + getattr(back, "bias", 0))
        s = step_by_the_book(node, np.stack(fed), dt)[-1]
    return step_by_the_book(node, np.stack(fed), dt)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["LIF", "CubaLIF"])
def test_a_loop_is_a_recurrent_layer_there_and_back(kind, bias):
    graph, node, back = loop_of(kind, bias)
    xs, dialect = np.asarray(inputs(6)), dataclasses.replace(interop.NIR, dt=0.5)
    model = interop.from_nir(graph, dialect)
    want = loop_by_the_book(node, back, xs, 0.5)
    got, _ = model(xs)
    assert_fires(want, high=0.6)
    assert_same_spikes(got, want)
    again = interop.from_nir(interop.to_nir(model, (6,), dialect), dialect)
    assert_same_spikes(again(xs)[0], want)


def braille(bias):
    """A network in the form of the NIR paper's Braille readers: a layer with feedback and a readout layer, both CubaLIF."""
    draw = np.random.default_rng(5)

    def dense(outs, ins, scale):
        weight, shift = draw.normal(size=(outs, ins)) * scale, draw.normal(size=outs) / 20
        return nir.Affine(weight, shift) if bias else nir.Linear(weight)

    def cuba(n):
        times = dict(tau_syn=np.full(n, 2e-4), tau_mem=np.full(n, 4e-4), w_in=np.full(n, 2.0), r=np.full(n, 4.0))
        return nir.CubaLIF(**times, v_threshold=np.ones(n), v_leak=np.zeros(n), v_reset=np.zeros(n))

    nodes = {"fc1": dense(9, 5, 0.7), "fc2": dense(4, 9, 0.9), "input": nir.Input([5])}
    nodes |= {"lif1.lif": cuba(9), "lif1.w_rec": dense(9, 9, 0.4), "lif2": cuba(4), "output": nir.Output([4])}
    edges = [("lif1.w_rec", "lif1.lif"), ("lif2", "output"), ("fc2", "lif2"), ("input", "fc1"), ("fc1", "lif1.lif")]
    edges += [("lif1.lif", "lif1.w_rec"), ("lif1.lif", "fc2")]
    return nir.NIRGraph(nodes, edges, type_check=False)


@pytest.mark.parametrize("bias, reset", [(True, "hard"), (False, "soft")])  # as the paper's two networks
def test_a_network_like_the_braille_readers_is_the_loop_over_its_graph(bias, reset):
    graph, xs, dt = braille(bias), np.asarray(inputs(5)), 1e-4
    through = lambda node, z: z @ node.weight.T + getattr(node, "bias", 0)
    synapse, v, z, wanted = {}, {}, np.zeros((xs.shape[1], 9)), []

    def step(name, x):
        n, i, before = graph.nodes[name], synapse.get(name, 0), v.get(name, 0)
        synapse[name] = i + dt / n.tau_syn * (n.w_in * x - i)
        u = before + dt / n.tau_mem * (n.r * synapse[name] - before)
        s = (u > n.v_threshold) * 1.0
        v[name] = u * (1 - s) if reset == "hard" else u - s * n.v_threshold
        return s

    for x in xs.astype(np.float64):
        z = step("lif1.lif", through(graph.nodes["fc1"], x) + through(graph.nodes["lif1.w_rec"], z))
        wanted.append((z, step("lif2", through(graph.nodes["fc2"], z))))
    hidden, outs = map(np.stack, zip(*wanted, strict=True))
    model = interop.from_nir(graph, dataclasses.replace(interop.SNNTORCH, reset=reset))
    (got, _), spikes = monitor.record(model, xs)
    assert_fires(hidden)
    assert_fires(outs)
    assert_same_spikes(got, outs)
    assert_same_spikes(next(s for s in spikes.values() if s.shape[-1] == 9), hidden)


def test_heads_and_a_mask_are_written_as_one_weight():
    layer = nn.Recurrent(nn.LIF(tau=2.0), 6, heads=2, self_connections=False, rngs=nnx.Rngs(0))
    graph = interop.to_nir(nn.Sequential(layer), (6,))
    weight = next(node.weight for node in graph.nodes.values() if isinstance(node, nir.Linear))
    assert np.all(np.diag(weight) == 0) and np.all(weight[:3, 3:] == 0) and np.any(weight[:3, :3] != 0)
    xs = inputs(6)
    assert_same_spikes(interop.from_nir(graph, interop.NIR)(xs)[0], layer(xs)[0])


# What cannot be.


def graph_of(**nodes):
    nodes = {"in": nir.Input([2]), **nodes, "out": nir.Output([2])}
    names = list(nodes)
    return nir.NIRGraph(nodes, list(zip(names, names[1:], strict=False)), type_check=False)


def uneven(**change):
    fields = dict(tau=np.full(2, 2e-4), r=np.ones(2), v_leak=np.zeros(2), v_threshold=np.ones(2), v_reset=np.zeros(2))
    return nir.LIF(**(fields | change))


def recurrent():
    graph = graph_of(lif=uneven(), w=nir.Linear(np.eye(2)), more=nir.Linear(np.eye(2)))
    graph.edges.append(("more", "lif"))
    return graph


def edited(edges=(), without=(), **nodes):
    graph = graph_of(w=nir.Linear(np.eye(2)))
    graph.nodes |= nodes
    graph.nodes = {k: v for k, v in graph.nodes.items() if k not in without}
    graph.edges = [e for e in graph.edges if not set(e) & set(without)] + list(edges)
    return graph


@pytest.mark.parametrize(
    "graph, error, message",
    [
        (graph_of(wait=nir.Delay(np.ones(2))), NotImplementedError, "node 'wait': Delay is not supported"),
        (
            recurrent(),
            NotImplementedError,
            r"a loop must go from an IF, LIF or CubaLIF through one Linear or Affine back to it; got (.* -> )*(more -> w|w -> more)",
        ),
        (
            graph_of(lif=uneven(v_leak=np.arange(2.0))),
            NotImplementedError,
            "node 'lif': v_leak must be the same for all neurons",
        ),
        (graph_of(lif=uneven(v_reset=np.arange(2.0))), NotImplementedError, "node 'lif': v_reset must be the same"),
        (graph_of(w=nir.Linear(np.ones((2, 2, 2)))), NotImplementedError, r"node 'w': weight must be \[out, in\]"),
        (edited(without=("in",)), ValueError, r"graph must have one Input; got 0: \[\]"),
        (edited(more=nir.Output([2])), ValueError, r"graph must have one Output; got 2: \['out', 'more'\]"),
        (edited(loose=nir.Scale(np.ones(2))), ValueError, "nothing comes to node 'loose'"),
        (edited(loose=nir.Scale(np.ones(2)), edges=[("w", "loose")]), ValueError, "nothing comes from node 'loose'"),
        (edited(edges=[("w", "ghost")]), ValueError, "the edge w -> ghost names no node 'ghost'"),
        (
            edited(sub=nir.NIRGraph({"a": nir.Input([2])}, [], type_check=False)),
            ValueError,
            "subgraph 'sub' must have one Output; got 0",
        ),
        (edited(edges=[("w", "out")]), ValueError, "graph: the edge w -> out is there twice"),
        (
            edited(w=nir.Linear(np.array([[1, np.nan], [0, 1]]))),
            ValueError,
            "node 'w': weight must be finite; got 1 NaN",
        ),
        (
            graph_of(lif=uneven(r=np.array([1, np.inf]))),
            ValueError,
            "node 'lif': r must be finite; got 1 NaN or infinite of 2",
        ),
        (7, TypeError, "graph must be a nir.NIRGraph or the path of a .nir file; got int"),
    ],
)
def test_graphs_that_cannot_be_read(graph, error, message):
    with pytest.raises(error, match=message):
        interop.from_nir(graph, interop.NIR)


@pytest.mark.parametrize("reset, delay", [("late", True), ("prompt", False)])
def test_snntorchs_resets_take_a_decay_for_each_neuron(reset, delay):
    tau, xs = np.array([2e-4, 4e-4]), np.asarray(inputs(2, scale=1.5)) - 0.3
    graph = nir.NIRGraph.from_list(uneven(tau=tau, r=tau / 1e-4))  # a gain of 1
    v, want = np.zeros(xs.shape[1:], np.float32), []
    for x in xs:
        reset_now = v > 1
        v = np.float32(1 - 1e-4 / tau) * v + x - reset_now
        want.append(v > 1)
        v = v if delay else v - want[-1] + reset_now.astype(np.float32)
    assert_fires(np.stack(want))
    got, _ = interop.from_nir(graph, dataclasses.replace(interop.SNNTORCH, reset=reset))(xs)
    assert_same_spikes(got, np.stack(want))


def test_a_layer_that_can_never_spike_is_named():
    """Whether the same file is silent depends on dt. NIR does not store dt, so the caller gives it."""
    graph = graph_of(w=nir.Linear(0.5 * np.eye(2)), lif=uneven(tau=np.full(2, 4e-4), r=np.full(2, 4.0)))
    with pytest.warns(
        UserWarning, match="node 'lif' cannot spike within 1000 steps on any 0/1 input.*dt = 1e-07 the exp"
    ):
        interop.from_nir(graph, interop.Dialect(dt=1e-7))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interop.from_nir(graph, interop.NIR)
    with pytest.raises(TypeError, match="dialect"):
        interop.from_nir(graph)


@pytest.mark.parametrize("content", [b"", b"no HDF5", None])
def test_files_that_cannot_be_read_are_named(content, tmp_path):
    path = tmp_path / "broken.nir"
    if content is None:
        h5py = pytest.importorskip("h5py")
        h5py.File(path, "w").close()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.nir cannot be read as a NIR graph: "):
        interop.from_nir(path, interop.NIR)
    with pytest.raises(FileNotFoundError, match="missing.nir"):
        interop.from_nir(tmp_path / "missing.nir", interop.NIR)


def test_snntorchs_neurons_leak_to_zero():
    with pytest.raises(NotImplementedError, match="node 'lif': snnTorch's neurons leak to 0; got v_leak 0.5"):
        interop.from_nir(graph_of(lif=uneven(v_leak=np.full(2, 0.5))), interop.SNNTORCH)


@pytest.mark.parametrize(
    "layers, shape, message",
    [
        ([jnp.tanh], (3,), r"layer 0 \(tanh\): NIR has no node for it on \(3,\)"),
        ([nn.LIF(tau=2.0), nn.AdaptiveLIF(tau=2.0, tau_adapt=2.0)], (3,), r"layer 1 \(AdaptiveLIF\): .*AdaptiveLIF"),
        ([nn.LIF(tau=2.0, reset=sf.SoftReset())], (3,), r"layer 0 \(LIF\): its reset is SoftReset.* 'hard'.*replace"),
        ([nn.IF(out_dtype=sf.Packed(8))], (3,), r"layer 0 \(IF\): its out_dtype is Packed"),
        ([nn.max_pool], (4, 4, 2), r"layer 0 \(max_pool\): NIR has no node for it on \(4, 4, 2\)"),
        ([nn.LI(decay=1.0)], (3,), r"layer 0 \(LI\): decay must be in \(0, 1\)"),
        ([nnx.Linear(3, 3, rngs=nnx.Rngs(0))], (4, 3), r"layer 0 \(Linear\): NIR's Affine takes vectors"),
        ([nn.flatten], (2, 2, 3), "the output is in the order of snnfuse.nn.flatten"),
        (
            [nn.flatten, nnx.BatchNorm(12, rngs=nnx.Rngs(0))],
            (2, 2, 3),
            r"layer 1 \(BatchNorm\): .* after snnfuse.nn.flatten",
        ),
        (
            [nnx.Conv(1, 1, 3, padding="CIRCULAR", rngs=nnx.Rngs(0))],
            (5, 1),
            "layer 0 .Conv.: NIR has no padding 'CIRCULAR'",
        ),
        (
            [partial(nnx.avg_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME")],
            (4, 4, 1),
            "pads alike on both sides",
        ),
    ],
)
def test_models_that_cannot_be_written(layers, shape, message):
    with pytest.raises(NotImplementedError, match=message):
        interop.to_nir(nn.Sequential(*layers), shape)


@pytest.mark.parametrize("features, shape", [(5, (3,)), (1, (4, 4, 3))])
def test_a_batchnorm_of_other_features_is_named(features, shape):
    layers = nn.Sequential(nnx.BatchNorm(features, rngs=nnx.Rngs(0)), nn.IF())
    with pytest.raises(ValueError, match=rf"layer 0 \(BatchNorm\), which has {features} features; got .* is given"):
        interop.to_nir(layers, shape)


@pytest.mark.parametrize(
    "layers, sources, where",
    [
        ([nn.IF()], [(-1, -1), (0,)], r"layer 0 \(IF\)"),
        ([nn.IF()], [(-1,), (0, 0)], "the output"),
        ([nn.flatten, nn.IF()], [(-1,), (-1, 0), (1,)], r"layer 1 \(IF\)"),  # a flatten of what is flat
    ],
)
def test_a_signal_summed_with_itself(layers, sources, where):
    with pytest.raises(NotImplementedError, match=f"{where}: one of its sources is there twice"):
        interop.to_nir(interop.Graph(layers, sources), (3,))


@pytest.mark.parametrize(
    "layer, shape, message",
    [
        (nn.IF(), 3, r"be the sizes \(H, W, C\), \(L, C\) or \(N,\) of one sample in one step; got 3"),
        (nn.IF(), (), r"be the sizes .*; got \(\)"),
        (nnx.Linear(3, 2, rngs=nnx.Rngs(0)), (4,), r"be such that layer 0 \(Linear\) is given \(3\); got \(4,\)"),
        (nnx.Conv(3, 2, 4, rngs=nnx.Rngs(0)), (3,), r"be such that layer 0 \(Conv\) is given \(L, 3\); got \(3,\)"),
        (
            nn.Conv(3, 2, (3, 3), rngs=nnx.Rngs(0)),
            (8, 8, 2),
            r"be such that layer 0 \(Conv\) is given \(H, W, 3\); got \(8, 8, 2\)",
        ),
        (nn.LIF(decay=jnp.full(3, 0.5)), (4,), r"fit layer 0 \(LIF\); got \(4,\)"),
    ],
)
def test_input_shapes_that_do_not_fit(layer, shape, message):
    with pytest.raises(ValueError, match=f"input_shape must {message}"):
        interop.to_nir(nn.Sequential(layer), shape)


def test_other_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match="reset must be one of .*; got 'none'"):
        interop.Dialect(reset="none")
    with pytest.raises(ValueError, match="dt must be above 0; got 0"):
        interop.Dialect(dt=0)
    with pytest.raises(ValueError, match=r"jumps must name types of NIR neurons; got \['lif'\]"):
        interop.Dialect(jumps=("lif",))
    with pytest.raises(ValueError, match=r"sources\[1\] must be places in -1..0; got \(1,\)"):
        interop.Graph([nn.IF()], [(-1,), (1,)])
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(ImportError, match=r'pip install "snnfuse\[nir\]"'):
        interop.from_nir("x.nir", interop.NIR)
