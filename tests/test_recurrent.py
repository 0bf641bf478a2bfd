"""The recurrent op: "scan" against a plain Python loop over `neuron.step`, the kernels against "scan".

NumPy runs the text of the kernels here, Triton compiles it to PTX if it is installed, and the tests marked `gpu` run it.
"""

import importlib.util
import threading
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_numpy
from cases import NEURONS, cotangents, make
from compare import assert_close, assert_fires, assert_same_spikes
from flax import nnx
from test_ops_triton import structs, to_ptx

import snnfuse as sf
from snnfuse import nn
from snnfuse.nn import monitor
from snnfuse.nn.recurrent import Recurrent
from snnfuse.ops import recurrent, recurrent_triton, triton
from snnfuse.ops.recurrent import RecurrentState, unroll_recurrent

LANES = (3, 12)


def case(name, heads=1, T=9, lanes=LANES, dtype=jnp.float32):
    """A case, its weight in multiples of 2^-10 (sums of spikes are then exact in any order), and a state."""
    c = make(name, T=T, lanes=lanes, dtype=dtype)
    size = lanes[-1] // heads
    most = min(256, int(1024 / size**0.5))  # a wide layer must neither fall silent nor fire at every step
    k = jax.random.randint(jax.random.key(1), (heads, size, size), -most, most + 1).astype(jnp.float32)
    fed = (jax.random.uniform(jax.random.key(2), lanes) < 0.2).astype(jnp.float32)
    return c, k / 1024, RecurrentState(c.state, fed)


def dense(weight):
    return jax.scipy.linalg.block_diag(*weight)


def loop(neuron, params, state, xs, weight, *, transpose=False, late=0):
    """The equation as a Python loop. `transpose` and `late` plant bugs."""
    lif, fed, outs, history = state.neuron, state.fed, [], [state.fed] * late
    w = dense(weight).T if transpose else dense(weight)
    for x in xs:
        history.append(fed)
        back = jnp.dot(history[len(history) - 1 - late], w, precision="highest")
        lif, fed = neuron.step(params, lif, x + back)
        outs.append(fed)
    return jnp.stack(outs), RecurrentState(lif, fed)


def pull(run, c, state, weight):
    outs, vjp = jax.vjp(lambda p, s, x, w: run(c.neuron, p, s, x, w), c.params, state, c.xs, weight)
    return outs, vjp(cotangents(outs))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("name", ["lif", "lif_soft", "cuba", "adaptive"])
def test_spikes_and_every_gradient_are_those_of_the_loop(name, heads):
    c, weight, state = case(name, heads)
    want, d_want = pull(loop, c, state, weight)
    got, d_got = pull(unroll_recurrent, c, state, weight)
    assert_fires(want[0], high=0.6)
    assert_same_spikes(got[0], want[0])
    assert_close(got, want, rtol=1e-5)
    assert_close(d_got, d_want, rtol=10 * NEURONS[name][-1])


@pytest.mark.parametrize("bug", [{"transpose": True}, {"late": 1}])
def test_a_planted_bug_is_seen(bug):
    c, weight, state = case("lif")
    wrong, _ = loop(c.neuron, c.params, state, c.xs, weight, **bug)
    got, _ = unroll_recurrent(c.neuron, c.params, state, c.xs, weight)
    with pytest.raises(AssertionError, match="spikes differ"):
        assert_same_spikes(got, wrong)


def test_swapped_heads_are_seen():
    c, weight, state = case("lif", heads=3)
    wrong, _ = loop(c.neuron, c.params, state, c.xs, weight[::-1])
    got, _ = unroll_recurrent(c.neuron, c.params, state, c.xs, weight)
    with pytest.raises(AssertionError, match="spikes differ"):
        assert_same_spikes(got, wrong)


def test_pieces_equal_the_whole():
    c, weight, state = case("adaptive")
    whole, end = unroll_recurrent(c.neuron, c.params, state, c.xs, weight)
    first, middle = unroll_recurrent(c.neuron, c.params, state, c.xs[:4], weight)
    second, last = unroll_recurrent(c.neuron, c.params, middle, c.xs[4:], weight)
    assert_same_spikes(jnp.concatenate([first, second]), whole)
    assert_close(last, end, rtol=1e-6)


def test_the_fed_back_value_is_taken_before_out_dtype():
    c, weight, state = case("li")
    weight = 0.1 * weight
    want, _ = loop(c.neuron, c.params, state, c.xs, weight)
    got, _ = unroll_recurrent(c.neuron, c.params, state, c.xs, weight, out_dtype=jnp.bfloat16)
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.bfloat16).astype(jnp.float32), rtol=2**-7)
    _, end = unroll_recurrent(c.neuron, c.params, state, c.xs, weight, out_dtype=jnp.int8)
    np.testing.assert_allclose(end.fed, want[-1], rtol=1e-5)


def test_bfloat16_rounds_the_weight_and_not_its_gradient():
    c, weight, state = case("lif")
    weight = weight + 1e-4 * jax.random.normal(jax.random.key(5), weight.shape)
    near = weight.astype(jnp.bfloat16).astype(jnp.float32)
    want, d_want = pull(unroll_recurrent, c, state, near)
    half = lambda *args: unroll_recurrent(*args, precision="bfloat16")
    got, d_got = pull(half, c, state, weight)
    assert_close((got, d_got), (want, d_want), rtol=1e-6)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"weight": jnp.ones((12, 11))}, ValueError, r"weight must be \[H, H\]"),
        ({"weight": jnp.ones((5, 2, 2))}, ValueError, "H = 12; got shape"),
        ({"weight": jnp.ones((12, 12), jnp.int32)}, TypeError, "weight must be a float array; got int32"),
        ({"feedback": 1}, ValueError, "feedback must be an index"),
        ({"precision": "half"}, ValueError, "precision must be one of"),
        ({"implementation": "mosaic"}, NotImplementedError, "no recurrent kernel"),
        ({"implementation": "fast"}, ValueError, "implementation must be"),
        ({"state": sf.LIFState(jnp.zeros(LANES))}, TypeError, "state must be None or RecurrentState"),
        ({"state": RecurrentState(sf.LIFState(jnp.zeros(LANES)), jnp.zeros(3))}, ValueError, "state.fed must be"),
    ],
)
def test_bad_input_is_named(change, error, match):
    c, weight, state = case("lif")
    args = {"state": state, "weight": weight, **change}
    with pytest.raises(error, match=match):
        unroll_recurrent(c.neuron, c.params, args.pop("state"), c.xs, args.pop("weight"), **args)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_module_trains_its_weight_and_keeps_removed_connections_out(heads):
    layer = Recurrent(nn.LIF(tau=2.0), 12, heads=heads, self_connections=False, rngs=nnx.Rngs(0))
    xs = make("lif", T=9, lanes=LANES).xs
    blocks = layer.weight[...].reshape(heads, 12 // heads, 12 // heads)
    np.testing.assert_allclose(blocks[0] @ blocks[0].T, np.eye(12 // heads), atol=1e-5)
    kept = blocks * (1 - np.eye(12 // heads, dtype=np.float32))
    want, _ = unroll_recurrent(layer.neuron.neuron, layer.neuron.params, None, xs, kept)
    outs, _ = layer(xs)
    assert_same_spikes(outs, want)
    grads = nnx.grad(lambda layer: jnp.square(layer(xs)[0]).sum())(layer)
    d = grads.weight[...].reshape(heads, 12 // heads, 12 // heads)
    assert np.all(np.asarray(jnp.diagonal(d, axis1=1, axis2=2)) == 0) and float(jnp.abs(d).max()) > 0


def test_a_monitor_records_a_recurrent_layer_and_counts_what_feeds_back():
    layer = Recurrent(nn.LIF(tau=2.0), 12, heads=3, rngs=nnx.Rngs(0))
    model, xs = nn.Sequential(lambda x: 2 * x, layer), make("lif", T=9, lanes=LANES).xs
    (outs, _), spikes = monitor.record(model, xs)
    assert list(spikes) == ["layers.1"]
    assert_fires(outs)
    assert_same_spikes(spikes["layers.1"], outs)
    states = monitor.record(model, xs, what="state")[1]["layers.1"]
    assert_close(states.v[-1], model(xs)[1][0].neuron.v, 1e-6)
    assert monitor.operations(model, xs) == {"layers.1": monitor.Operations(acs=4 * int(outs[:-1].sum()))}


def test_the_module_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="features must be a positive multiple of heads"):
        Recurrent(nn.LIF(tau=2.0), 10, heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mask must have the shape of the weight"):
        Recurrent(nn.LIF(tau=2.0), 4, mask=jnp.ones((3, 3)), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="neuron must be a module"):
        Recurrent(sf.LIF(), 4, rngs=nnx.Rngs(0))


# ---- the kernels


def kernels(neuron, params, state, xs, weight, precision="float32", out_dtype=None, **sizes):
    """`unroll_recurrent` by the kernels, also where there is no GPU, with other block sizes."""
    problem, call, *arrays = recurrent.check_call_with_weight(
        neuron, params, state, xs, weight, 0, precision, out_dtype
    )
    assert (why := recurrent_triton.why_not_kernels(problem, call)) is None, why
    blocks = recurrent_triton.blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent_triton, "blocks", lambda *args: blocks(*args)._replace(**sizes))
        outs, final, fed = recurrent_triton.run(problem, call, *arrays)
    return problem.out_tree.unflatten(outs), RecurrentState(problem.step.state_tree.unflatten(final), fed)


@pytest.fixture
def on_numpy(monkeypatch):
    """NumPy runs the text of the kernels. `on_numpy(old, new)` plants a bug in it."""
    triton_on_numpy.install(monkeypatch)
    recurrent_triton._run.clear_cache()

    def plant(old, new):
        def kernel(text, name):
            assert old in text or "backward" not in name
            return triton_on_numpy.module(text.replace(old, new))[name]

        monkeypatch.setattr(triton, "kernel", kernel)

    yield plant
    recurrent_triton._run.clear_cache()


PLAIN = dict(heads=1, T=9, lanes=LANES)
KERNELS = {
    "masks and a last short chunk": PLAIN,
    "heads": dict(PLAIN, heads=3),
    "no masks": dict(PLAIN, T=8, lanes=(8, 16)),
    "one step": dict(PLAIN, T=1),
    "two axes of samples": dict(PLAIN, lanes=(3, 4, 5), T=4),
    "bfloat16": dict(PLAIN, dtype=jnp.bfloat16),
}


def check_kernels(c, weight, state, rtol, **options):
    want, d_want = pull(
        recurrent.unroll_recurrent if not options else partial(unroll_scan, **options), c, state, weight
    )
    got, d_got = pull(partial(kernels, **options), c, state, weight)
    spikes = jax.tree.leaves(want[0])[0]
    if spikes.size > 1000:
        assert_fires(spikes, high=0.6)
    assert_same_spikes(jax.tree.leaves(got[0])[0], spikes)
    assert_close(got, want, rtol=1e-5)
    assert_close(d_got, d_want, rtol=rtol)


SPLIT = dict(size=16, rows=8, chunk=2, slots=2)
SPLIT_KERNELS = {
    "masks and a last short chunk": (dict(heads=1, T=5, lanes=(19, 40)), dict(SPLIT, programs=3)),
    "heads, one group after the other": (dict(heads=2, T=4, lanes=(3, 3, 64)), dict(SPLIT, programs=2)),
    "no masks": (dict(heads=1, T=4, lanes=(16, 64)), dict(SPLIT, programs=4)),
}


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("which", SPLIT_KERNELS)
def test_kernels_of_a_split_head_give_what_scan_gives(which, precision, on_numpy):
    """Programs of 16 neurons run in threads, and wait for each other in each step."""
    made, sizes = SPLIT_KERNELS[which]
    c, weight, state = case("adaptive" if "heads" in which else "lif", **made)
    want, d_want = pull(partial(unroll_scan, precision=precision), c, state, weight)
    got, d_got = pull(partial(kernels, precision=precision, **sizes), c, state, weight)
    assert_fires(want[0], high=0.6)
    assert_same_spikes(got[0], want[0])
    assert_close(got, want, rtol=1e-5)
    assert_close(d_got, d_want, rtol=2**-6 if precision == "bfloat16" else 1e-4)


class Weighted(NamedTuple):
    weight: jax.Array
    fed: jax.Array


class Counted(NamedTuple):
    count: jax.Array
    head: jax.Array


@dataclass(frozen=True)
class Odd:
    """Its leaves have the names of variables of the kernels."""

    def init_state(self, shape):
        return Counted(jnp.zeros(shape), jnp.zeros(shape))

    def step(self, params, state, x):
        count = params.weight * state.count + x
        s = sf.LIF().step(sf.LIFParams(params.fed, 1.0), sf.LIFState(state.head), count)[1]
        return Counted(count, params.fed * state.head * (1 - s) + s), s


@pytest.mark.parametrize("sizes", [{}, dict(SPLIT, programs=3)])
def test_a_neuron_may_use_the_names_of_the_kernels(sizes, on_numpy):
    c, weight, _ = case("lif", T=4, lanes=(3, 40))
    c = c._replace(neuron=Odd(), params=Weighted(jnp.full(40, 0.5), jnp.full(40, 0.25)))
    state = RecurrentState(Counted(jnp.zeros((3, 40)), jnp.full((3, 40), 0.1)), jnp.zeros((3, 40)))
    want, d_want = pull(unroll_scan, c, state, weight)
    got, d_got = pull(partial(kernels, **sizes), c, state, weight)
    assert_same_spikes(got[0], want[0])
    assert_close(d_got, d_want, 1e-4)


def unroll_scan(*args, **options):
    return unroll_recurrent(*args, implementation="scan", **options)


@pytest.mark.parametrize("name, which", [("lif", k) for k in KERNELS] + [(n, "heads") for n in ("cuba", "adaptive")])
def test_kernels_give_what_scan_gives(name, which, on_numpy):
    c, weight, state = case(name, **KERNELS[which])
    narrow = KERNELS[which].get("dtype") == jnp.bfloat16
    check_kernels(c, weight, state, 2**-7 if narrow else 10 * NEURONS[name][-1])


def test_kernels_for_a_neuron_of_two_inputs(on_numpy):
    """The user's own neuron: two input leaves, three kinds of parameter. The product is added to the first input."""
    c, weight, state = case("affine")
    check_kernels(c, weight, state, 1e-4)


@pytest.mark.parametrize("precision, rtol", [("bfloat16", 2**-6), ("bfloat16x2", 2**-14), ("float32", 1e-5)])
def test_precision_of_the_kernels(precision, rtol, on_numpy):
    """With weights that need all of float32. The spikes are compared where no sum is near the threshold."""
    c, weight, state = case("lif")
    weight = weight + 1e-3 * jax.random.normal(jax.random.key(5), weight.shape)
    want, d_want = pull(partial(unroll_scan, precision=precision), c, state, weight)
    got, d_got = pull(partial(kernels, precision=precision), c, state, weight)
    assert_same_spikes(got[0], want[0])
    assert_close(d_got, d_want, rtol)


def test_three_parts_are_float32_and_two_have_16_bits():
    w = jax.random.normal(jax.random.key(0), (1000,)) * 10.0 ** jax.random.randint(jax.random.key(1), (1000,), -9, 9)
    total = lambda parts: sum(p.astype(jnp.float32) for p in recurrent_triton.split(w, parts)[::-1])
    np.testing.assert_array_equal(total(3), w)
    for parts, precision, bits in ((1, "bfloat16", 8), (2, "bfloat16x2", 16)):
        np.testing.assert_allclose(total(parts), w, rtol=2.0**-bits)
        np.testing.assert_array_equal(total(parts), recurrent.rounded(w, precision))


@pytest.mark.parametrize("lanes, sizes", [(LANES, {}), ((3, 40), dict(size=16, rows=8, programs=3))])
def test_kernels_in_pieces_equal_the_whole_to_the_last_bit(lanes, sizes, on_numpy):
    c, weight, state = case("adaptive", lanes=lanes)
    weight = weight + 1e-3 * jax.random.normal(jax.random.key(5), weight.shape)
    whole, end = kernels(c.neuron, c.params, state, c.xs, weight, **sizes)
    first, middle = kernels(c.neuron, c.params, state, c.xs[:4], weight, **sizes)
    second, last = kernels(c.neuron, c.params, middle, c.xs[4:], weight, **sizes)
    jax.tree.map(np.testing.assert_array_equal, (jnp.concatenate([first, second]), last), (whole, end))


@pytest.mark.parametrize("lanes, sizes", [(LANES, {}), ((3, 40), dict(size=16, rows=8, programs=3))])
def test_a_first_output_that_is_no_spike_starts_the_kernels_exactly(lanes, sizes, on_numpy):
    c, weight, state = case("lif", lanes=lanes)
    state = state._replace(fed=jax.random.normal(jax.random.key(3), lanes))
    want, d_want = pull(unroll_scan, c, state, weight)
    got, d_got = pull(partial(kernels, **sizes), c, state, weight)
    assert_close((got, d_got), (want, d_want), 1e-4)


@pytest.mark.parametrize("out_dtype", [jnp.bool_, jnp.int8, jnp.bfloat16, sf.Packed(8)])
def test_kernels_and_out_dtype(out_dtype, on_numpy):
    c, weight, _ = case("lif")
    loss = lambda run, x, w: (run(c.neuron, c.params, None, x, w, out_dtype=out_dtype)[1].neuron.v ** 2).sum()
    got, want = (run(c.neuron, c.params, None, c.xs, weight, out_dtype=out_dtype) for run in (kernels, unroll_scan))
    assert got[0].dtype == want[0].dtype and (got[0] == want[0]).all()
    got, want = (jax.grad(partial(loss, run), (0, 1))(c.xs, weight) for run in (kernels, unroll_scan))
    assert_close(got, want, 1e-5)


PLANTED = {
    "weight not transposed": ("HEADS, True)", "HEADS, False)"),
    "heads swapped": ("* HEADS + tl.program_id(1))", "* HEADS + HEADS - 1 - tl.program_id(1))"),
    "s[t-1] lost between chunks": ("split(d_x, PARTS)", "split(d_x * (k > 0), PARTS)"),
    "d_current of the same step": ("d_out = d_out_at[k].to(tl.float32) + back", "d_out = d_out_at[k].to(tl.float32)"),
    "padding not masked": ("(neuron < HEAD) & ", ""),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_bug_planted_in_the_kernels_is_seen(bug, on_numpy):
    on_numpy(*PLANTED[bug])
    c, weight, state = case("lif", heads=3)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        check_kernels(c, weight, state, 1e-4)


@pytest.mark.parametrize("mapped", [("xs",), ("weight", "xs")])
def test_kernels_under_vmap(mapped, on_numpy):
    c, weight, state = case("lif")
    axes = [0 if name in mapped else None for name in ("xs", "weight")]
    xs = jnp.stack([c.xs, 0.5 * c.xs]) if axes[0] == 0 else c.xs
    weights = jnp.stack([weight, -weight]) if axes[1] == 0 else weight

    def gradients(run):
        loss = lambda x, w: (run(c.neuron, c.params, state, x, w)[0] * c.xs).sum()
        return jax.vmap(jax.grad(loss, (0, 1)), axes)(xs, weights)

    assert_close(gradients(kernels), gradients(unroll_scan), 1e-5)


@dataclass(frozen=True)
class Graded:
    """A neuron whose output is a number, not a spike."""

    def init_state(self, shape):
        return jnp.zeros(shape, jnp.float32)

    def step(self, params, state, x):
        v = params * state + x
        return v, jnp.tanh(v)


def why_not(neuron, params, H, precision="bfloat16", heads=1, check=recurrent_triton.why_not_kernels):
    weight = jnp.ones((heads, H // heads, H // heads))
    args = neuron, params, None, jnp.ones((2, 3, H)), weight, 0, precision, None
    problem, call, *_ = recurrent.check_call_with_weight(*args)
    return check(problem, call)


def test_what_the_kernels_cannot_do_is_said(monkeypatch):
    assert why_not(sf.LIF(), sf.LIFParams(), 256) is None and why_not(sf.LIF(), sf.LIFParams(), 512, heads=2) is None
    most = {"bfloat16": 1024, "bfloat16x2": 1024, "float32": 512}
    for precision in most:
        assert why_not(sf.LIF(), sf.LIFParams(), most[precision], precision) is None
        assert f"at most {most[precision]} neurons a head" in why_not(sf.LIF(), sf.LIFParams(), 1025, precision)
    with monkeypatch.context() as patch:
        patch.setattr(recurrent_triton, "multiprocessors", lambda: 15)
        assert "split over 16 programs, which must run at once; the device has 15" in why_not(
            sf.LIF(), sf.LIFParams(), 1000
        )
    with monkeypatch.context() as patch:
        patch.setattr(triton, "why_not_here", lambda: None)
        patch.setattr(recurrent_triton, "compute_capability", lambda: 8.0)
        assert "needs compute capability 9 or 10, the device has 8.0" in why_not(
            sf.LIF(), sf.LIFParams(), 1000, check=recurrent_triton.why_not
        )
    assert "neuron Graded: the output that feeds back is not always 0 or 1" in why_not(Graded(), jnp.float32(0.5), 8)
    c, weight, state = case("lif")
    with pytest.raises(NotImplementedError, match="'triton': it needs a GPU"):
        monkeypatch.setattr(triton, "platform", lambda: "cpu")
        unroll_recurrent(c.neuron, c.params, state, c.xs, weight, implementation="triton")


def test_explain_covers_recurrent_calls(monkeypatch):
    c, weight, state = case("lif")
    said = sf.explain(c.neuron, c.params, state, c.xs, weight=weight, source=True)
    assert said.implementation == "scan" and "needs a GPU" in said.why_not["triton"]
    assert "def snn_recurrent_forward(" in said.source and "def snn_recurrent_backward(" in said.source
    monkeypatch.setattr(recurrent_triton.triton, "why_not_here", lambda: None)
    said = sf.explain(c.neuron, c.params, None, c.xs, weight=weight)
    current, checkpoints = 4 * c.xs.size, 3 * 4 * 36
    assert said.implementation == "triton" and said.kept_bytes == current + checkpoints
    assert "8" in str(said.blocks) and said.why_not == {"scan": None}


COMPILED = {
    "H = 256": dict(lanes=(256, 256), T=8, precision="bfloat16", dtype=jnp.bfloat16),
    "three parts": dict(lanes=(5, 100), T=6, precision="float32"),
    "bool": dict(lanes=(8, 16), T=4, precision="bfloat16x2", out_dtype=jnp.bool_),
    "split head": dict(lanes=(32, 512), T=4, precision="bfloat16", dtype=jnp.bfloat16),
    "split head, three parts": dict(lanes=(20, 320), T=3, precision="float32"),
    "the widest head, from a state": dict(
        lanes=(256, 1024), T=2, precision="bfloat16", dtype=jnp.bfloat16, starts=True
    ),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name, which", [*(("lif", k) for k in COMPILED), ("adaptive", "three parts")])
def test_the_kernels_compile_to_ptx(name, which, monkeypatch):
    """Each step waits at two barriers, around the spikes' way through shared memory, and at no other."""
    options = dict(COMPILED[which])
    T, lanes, dtype = options.pop("T"), options.pop("lanes"), options.pop("dtype", jnp.float32)
    starts, compiled = options.pop("starts", False), []

    def called(kernel, args, shapes, grid, warps, constants):
        compiled.append((kernel.__name__, constants, to_ptx(kernel, args, shapes, warps, constants, 90)))
        return [jnp.zeros(s.shape, s.dtype) for s in shapes]

    triton_on_numpy.install(monkeypatch, called=called)
    neuron, params, xs = structs(name, T, lanes, dtype)
    weight = jax.ShapeDtypeStruct((lanes[-1],) * 2, jnp.float32)
    state = jax.eval_shape(lambda: RecurrentState(neuron.init_state(lanes), jnp.zeros(lanes))) if starts else None
    run = lambda p, x, w, state: kernels(neuron, p, state, x, w, **options)[1]
    loss = lambda *args: sum(a.sum() for a in jax.tree.leaves(run(*args)))
    jax.eval_shape(jax.grad(loss, (0, 1, 2)), params, xs, weight, state)
    assert [name for name, *_ in compiled[-2:]] == ["snn_recurrent_forward", "snn_recurrent_backward"]
    for kernel, constants, ptx in compiled:
        assert ".local" not in ptx and ("wgmma" in ptx) == ("PROGRAMS" in constants)
        steps = constants["K"] + constants["TAIL"]
        parts = constants["PARTS"] if kernel.endswith("backward") else 1
        assert ptx.count("bar.sync") <= 2 * steps * parts + constants["PARTS"] + 1 + 2 * starts


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="jax-triton is not installed"),
]


def fused(*args, **options):
    return unroll_recurrent(*args, implementation="triton", **options)


def compare_on_gpu(c, weight, state, precision, rtol):
    run = lambda unroll: jax.jit(lambda: pull(partial(unroll, precision=precision), c, state, weight))()
    (want, d_want), (got, d_got), again = run(unroll_scan), run(fused), run(fused)
    spikes = jax.tree.leaves(want[0])[0]
    if spikes.size > 1000:
        assert_fires(spikes, high=0.6)
    assert_same_spikes(jax.tree.leaves(got[0])[0], spikes)
    assert_close(got, want, rtol=1e-5)
    assert_close(d_got, d_want, rtol)
    jax.tree.map(np.testing.assert_array_equal, (got, d_got), again)


@pytest.mark.parametrize("T", [pytest.param(T, marks=ON_GPU) for T in (1, 2, 31, 256)])
@pytest.mark.parametrize("B", [1, 5, 64, 256, 300])
@pytest.mark.parametrize("H", [1, 17, 64, 128, 200, 256, 384, 512, 1000, 1024])
def test_contract_on_a_gpu(H, B, T):
    """With decay 1/2, so that no product is rounded: XLA and Triton then agree whichever of them fuses a multiply-add."""
    precision = "bfloat16" if T == 31 or H > 512 or H == 200 else "float32"
    c, weight, state = case("lif", T=T, lanes=(B, H))
    c = c._replace(params=sf.LIFParams(jnp.full(H, 0.5), jnp.ones((B, H))))
    compare_on_gpu(c, weight, state, precision, 2**-5 if precision == "bfloat16" else 1e-4)


@pytest.mark.parametrize("name", [pytest.param(n, marks=ON_GPU) for n in ("cuba", "adaptive", "affine", "lif_soft")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_contract_of_more_neurons_on_a_gpu(name, dtype):
    c, weight, state = case(name, heads=4, T=37, lanes=(3, 7, 400), dtype=dtype)
    compare_on_gpu(c, weight, state, "bfloat16x2", 1e-3 if dtype == jnp.float32 else 2**-6)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="jax-triton is not installed")
@pytest.mark.parametrize("H, heads", [(256, 1), (1024, 1), (2000, 2)])
def test_two_parts_of_a_split_head_on_a_gpu(H, heads):
    c, weight, state = case("adaptive", heads, T=37, lanes=(21, H))
    compare_on_gpu(c, weight, state, "bfloat16x2", 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="jax-triton is not installed")
def test_a_split_head_runs_beside_other_kernels():
    """Its programs wait for each other. Some start late, when another stream keeps the GPU busy; none may wait for ever."""
    torch = pytest.importorskip("torch")
    c, weight, state = case("lif", T=64, lanes=(256, 1024))
    run = jax.jit(lambda: pull(partial(fused, precision="bfloat16"), c, state, weight))
    alone, done = jax.block_until_ready(run()), threading.Event()

    def others():
        stream, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
        with torch.cuda.stream(stream):
            while not done.is_set():
                for _ in range(20):
                    a @ a
                stream.synchronize()

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(50):
            jax.tree.map(np.testing.assert_array_equal, run(), alone)
    finally:
        done.set()
        thread.join()
