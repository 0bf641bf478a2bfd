"""How many kernels a call has, how large its program is, what it stores; and planted bugs that the comparison must find."""

import math
import re
import sys
from dataclasses import replace
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_fires, assert_same_spikes
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import snnfuse as sf
from snnfuse.ops import blocks, fused, implementations, triton
from snnfuse.ops.blocks import Blocks, param_groups
from snnfuse.ops.check import check_call
from snnfuse.ops.pallas_triton import PallasKernels


def h100(devices=1):
    """In this scope code is traced as for an H100, on a machine that has none."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((devices,), ("x",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def struct(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def lower(f, *args):
    with h100():
        return jax.jit(f).trace(*struct(args)).lower(lowering_platforms=("cuda",)).as_text()


def kernels(f, *args):
    """The custom calls of f lowered for CUDA, in order."""
    return re.findall(r"custom_call @(\S+?)\(", lower(f, *args))


LOWERED = {"pallas": "__gpu$xla.gpu.triton", "mosaic": "mosaic_gpu_v2"}


@pytest.mark.parametrize("implementation", LOWERED)
@pytest.mark.parametrize("name", cases.NEURONS)
def test_lowers_for_cuda_to_one_kernel_and_with_the_gradient_to_two(name, implementation):
    if implementation == "mosaic" and jax.__version_info__ < (0, 11, 2):
        pytest.skip("Mosaic GPU is used from JAX 0.11.2 on")
    neuron, *args, _ = cases.make(name, T=20, lanes=(3, 50))
    f = partial(sf.unroll, neuron, implementation=implementation)

    def gradient(args, cotangents):
        out, vjp = jax.vjp(f, *args)
        return out, vjp(cotangents)

    like = jax.eval_shape(partial(sf.unroll, neuron, implementation="scan"), *args)
    assert kernels(f, *args) == [LOWERED[implementation]]
    assert kernels(gradient, args, like) == [LOWERED[implementation]] * 2


def test_no_operation_of_a_kernel_searches_for_the_module_of_its_dialect(monkeypatch):
    """A search that fails is made again for the next operation: it took more than half of the time of lowering."""
    searched = []

    class Search:
        def find_spec(self, name, path=None, target=None):
            searched.append(name)

    monkeypatch.setattr(sys, "meta_path", [Search(), *sys.meta_path])
    neuron, *args, _ = cases.make("lif", T=3, lanes=(40,))
    assert kernels(partial(sf.unroll, neuron, implementation="pallas"), *args) == [LOWERED["pallas"]]
    assert searched.count("jaxlib.mlir.dialects.tt") <= 1


@pytest.mark.parametrize("implementation", LOWERED)
def test_lowers_for_cuda_in_a_shard_map_that_checks_what_varies(implementation):
    """Every result is typed as varying over the devices, and JAX sums the gradient of a shared parameter over them."""
    if implementation == "mosaic" and jax.__version_info__ < (0, 11, 2):
        pytest.skip("Mosaic GPU is used from JAX 0.11.2 on")
    neuron, *args, _ = cases.make("lif", T=20, lanes=(4, 256))

    def gradient(params, state, xs):
        out, vjp = jax.vjp(partial(sf.unroll, neuron, implementation=implementation), params, state, xs)
        return out, vjp(out)

    lanes, time = P("x"), P(None, "x")
    specs = dict(in_specs=(P(), lanes, time), out_specs=((time, lanes), (P(), lanes, time)))
    with h100(2):
        mapped = jax.jit(jax.shard_map(gradient, **specs))
        text = mapped.trace(*struct(args)).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"custom_call @(\S+?)\(", text) == [LOWERED[implementation]] * 2
    assert text.count("all_reduce") == len(jax.tree.leaves(args[0]))


@pytest.mark.parametrize("here", [None, "it needs jax-triton"])
@pytest.mark.parametrize("T, name", [(1, "scan"), (2, "pallas"), (9, "pallas")])
def test_none_takes_the_fastest(T, name, here, monkeypatch):
    monkeypatch.setattr(triton, "why_not_here", lambda: here)
    neuron, *args, _ = cases.make("lif", T=T)
    with h100():
        assert sf.explain(neuron, *struct(args)).implementation == name


def test_none_takes_the_fused_kernel_on_a_gpu_and_scan_for_a_neuron_that_mixes_lanes(monkeypatch):
    monkeypatch.setattr(triton, "why_not_here", lambda: "it needs jax-triton")
    neuron, *args, _ = cases.make("lif")
    assert kernels(partial(sf.unroll, neuron), *args) == [LOWERED["pallas"]]
    assert kernels(partial(sf.unroll, SumsLanes(neuron)), *args) == []
    with h100():
        said = sf.explain(SumsLanes(neuron), *struct(args))
        assert said.implementation == "scan" and "`reduce_sum`" in said.why_not["pallas"]
        said = sf.explain(neuron, *struct(args))
        assert said.implementation == "pallas" and said.blocks.lanes == 64


@pytest.mark.parametrize("gradient", [False, True])
def test_the_program_does_not_grow_with_time(gradient):
    def equations(T):
        neuron, params, state, xs, _ = cases.make("adaptive", T=1, lanes=(70000,))
        xs = jax.ShapeDtypeStruct((T, *xs.shape[1:]), xs.dtype)  # no array: it would take a gigabyte
        f = lambda *args: sf.unroll(neuron, *args, implementation="interpret")
        g = (lambda *args: jax.vjp(f, *args)[1](f(*args))) if gradient else f
        return count(jax.make_jaxpr(g)(*struct((params, state, xs))).jaxpr)

    def count(jaxpr):
        inner = [p for e in jaxpr.eqns for p in jax.tree.leaves(e.params, is_leaf=lambda p: hasattr(p, "eqns"))]
        return len(jaxpr.eqns) + sum(
            count(getattr(p, "jaxpr", p)) for p in inner if hasattr(getattr(p, "jaxpr", p), "eqns")
        )

    assert 30 < equations(16) == equations(4096)


def test_keeps_its_inputs_and_checkpoints_and_nothing_else():
    neuron, params, state, xs, _ = cases.make("cuba", T=24, lanes=(2, 50))
    f = partial(sf.unroll, neuron, implementation="interpret")
    _, vjp = jax.vjp(f, params, state, xs)
    kept = sorted(leaf.size for leaf in jax.tree.leaves(vjp))
    checkpoints = [(24 // 4 - 1, 100)] * 2  # two state leaves, the interpreter's chunk of 4, none for the first chunk
    assert kept == sorted(math.prod(shape) for shape in [(24, 100), (100,), (100,), *checkpoints, (1,), (50,), (100,)])


LEARNED = {"scalar": (), "per channel": (64,), "per sample": (8, 1, 1), "per lane": (8, 2, 64)}


@pytest.mark.parametrize("shape", LEARNED.values(), ids=LEARNED)
@pytest.mark.parametrize("start", [None, 0.2])
def test_a_program_adds_the_gradients_of_params_over_several_blocks(shape, start, monkeypatch):
    monkeypatch.setattr(blocks, "PROGRAMS", 2)
    key, lanes = jax.random.key(3), (8, 2, 64)
    xs, cotangent = jax.random.normal(key, (5, *lanes)) + 0.3, jax.random.normal(jax.random.key(4), (5, *lanes))
    params = sf.LIFParams(jax.random.uniform(key, shape, minval=0.3, maxval=0.9), jnp.ones(shape))
    state = None if start is None else sf.LIFState(jnp.full(lanes, start))

    def gradients(implementation):
        run = lambda params, state, xs: sf.unroll(sf.LIF(), params, state, xs, implementation=implementation)[0]

        @jax.jit
        def pulled_back(*args):
            out, vjp = jax.vjp(run, *args)
            return out, vjp(cotangent)

        out, gradients = pulled_back(params, state, xs)
        assert_fires(out)
        return gradients

    assert_close(gradients("interpret"), gradients("scan"), rtol=1e-5)


def test_the_parts_of_a_gradient_of_params_are_few():
    M = 2**23
    gradient = jax.grad(lambda decay, xs: sf.unroll(sf.LIF(), sf.LIFParams(decay), None, xs)[0].sum())
    groups = lambda T, *periods: param_groups(lif(T, M), Blocks(256, 2, T), periods)
    assert [groups(T, 64) for T in (1, 4, 8, 16, 100)] == [16, 16, 8, 1, 1]
    assert groups(4) == groups(4, M) == 1
    assert groups(4, 1, 64) == groups(4, 2**15) == 16
    assert f"tensor<{M // 16}xf32>" in lower(gradient, jnp.ones(64), jnp.ones((4, M // 64, 64), jnp.bfloat16))


def lif(T, M):
    problem = check_call(sf.LIF(), sf.LIFParams(), None, jnp.ones((T, 8)), None)[0]
    return replace(problem, lane_shape=(M,))


def final_state(neuron, implementation, params, state, xs):
    problem, *leaves = check_call(neuron, params, state, xs, None)
    outs, final = fused.run(implementations.get(implementation).passes(problem.state_only), *leaves)
    assert outs == ()
    return problem.step.state_tree.unflatten(final)


@pytest.mark.parametrize("name", ["lif", "affine", "cuba"])
def test_a_run_for_the_state_alone(name):
    """The kernel returns one array for each leaf of the state, and none with T steps; the values are those of a full run."""
    neuron, *args, rtol = cases.make(name, T=21, lanes=(3, 50))
    for implementation in LOWERED if jax.__version_info__ >= (0, 11, 2) else ["pallas"]:
        text = lower(partial(final_state, neuron, implementation), *args)
        (call,) = [line for line in text.splitlines() if f"custom_call @{LOWERED[implementation]}" in line]
        results = call.rsplit(" -> ", 1)[1]
        assert results.count("tensor") == len(jax.tree.leaves(args[1])) and "<21x" not in results
    want = sf.unroll(neuron, *args, implementation="scan")[1]
    for implementation in ("scan", "interpret"):
        assert_close(final_state(neuron, implementation, *args), want, rtol)


def test_what_nobody_asks_for_is_not_computed():
    """First layer of a network: no gradient of xs, a constant state, no use of the final state."""
    neuron, params, _, xs, _ = cases.make("lif", T=8, lanes=(512,))

    def loss(params, xs):
        return (sf.unroll(neuron, params, None, xs, implementation="pallas")[0] * xs).sum()

    text = lower(jax.value_and_grad(loss), params, xs)
    calls = [line for line in text.splitlines() if "custom_call" in line and "triton" in line]
    ins, outs = zip(*(line.rsplit(" : ", 1)[1].split(" -> ") for line in calls), strict=True)
    assert [i.count("tensor") for i in ins] == [
        3,
        4,
    ]  # params and xs; the backward kernel also gets the cotangent of the spikes
    assert [o.count("tensor") for o in outs] == [2, 2]  # spikes and final state; the gradients of the params
    assert "8x512" in outs[0] and "8x512" not in outs[1]


class SumsLanes:
    """A neuron with lateral inhibition, so it is not pointwise over lanes."""

    def __init__(self, inner):
        self.inner = inner

    def init_state(self, shape):
        return self.inner.init_state(shape)

    def step(self, params, state, x):
        return self.inner.step(params, state, x - 0.01 * x.mean(-1, keepdims=True))


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x - x.mean(-1, keepdims=True),
        lambda x: jnp.cumsum(x, -1),
        lambda x: jnp.roll(x, 1, -1),
        lambda x: x[..., ::-1],
        lambda x: jnp.sort(x, -1),
        lambda x: x / x.shape[-1],
        lambda x: x + jnp.arange(x.shape[-1], dtype=x.dtype),
        lambda x: jax.nn.softmax(x, -1),
        lambda x: x @ jnp.eye(x.shape[-1]),
        lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
        lambda x: x * jax.lax.stop_gradient(x.max()),
    ],
)
def test_a_neuron_that_mixes_lanes_is_refused(mix):
    class Mixes:
        def init_state(self, shape):
            return sf.LIF().init_state(shape)

        def step(self, params, state, x):
            return sf.LIF().step(params, state, mix(x))

    xs = jax.random.normal(jax.random.key(0), (5, 3, 40))
    sf.unroll(Mixes(), sf.LIFParams(), None, xs, implementation="scan")
    with pytest.raises(NotImplementedError, match="neuron Mixes: its step"):
        sf.unroll(Mixes(), sf.LIFParams(), None, xs, implementation="interpret")


PLANTED = {
    "d_x is late by a step": lambda d_s, d_p, d_x: (d_s, d_p, [d_x[0], *d_x[:-1]]),
    "the last step of a chunk has no d_x": lambda d_s, d_p, d_x: (d_s, d_p, [*d_x[:-1], [0 * d for d in d_x[-1]]]),
    "one lane in a block is wrong": lambda d_s, d_p, d_x: (
        d_s,
        d_p,
        [[d + (jnp.arange(d.shape[0]) == 77) for d in step] for step in d_x],
    ),
    "the state's cotangent is lost between chunks": lambda d_s, d_p, d_x: (tuple(0 * d for d in d_s), d_p, d_x),
    "a parameter's gradient is doubled": lambda d_s, d_p, d_x: (d_s, (2 * d_p[0], *d_p[1:]), d_x),
}


PLANTED_IN = cases.make("lif", T=8, lanes=(2, 50))


def gradients_with_kernels(implementation):
    """A new function for each call, because a bug is planted in some of them."""

    @jax.jit
    def run(*args):
        out, vjp = jax.vjp(partial(sf.unroll, PLANTED_IN.neuron, implementation=implementation), *args)
        return vjp(cases.cotangents(out))

    return run(PLANTED_IN.params, PLANTED_IN.state, PLANTED_IN.xs)


@pytest.fixture(scope="module")
def gradients_of_scan():
    return gradients_with_kernels("scan")


@pytest.mark.parametrize("bug", [None, *PLANTED])
def test_planted_bugs_in_the_backward_kernel_are_caught(bug, gradients_of_scan, monkeypatch):
    """The comparison of the contract test must fail when `chunk_backward`, the body of the backward kernel, has a bug."""
    real = fused.chunk_backward

    def planted(*args):
        d_p, d_s, d_x = real(*args)
        d_s, d_p, d_x = PLANTED[bug](d_s, d_p, d_x)
        return d_p, d_s, d_x

    if bug:
        monkeypatch.setattr(fused, "chunk_backward", planted)
    fused._run.clear_cache()
    if bug is None:
        assert_close(gradients_with_kernels("interpret"), gradients_of_scan, 1e-5)
    else:
        with pytest.raises(AssertionError, match="error"):
            assert_close(gradients_with_kernels("interpret"), gradients_of_scan, 1e-5)
    fused._run.clear_cache()


RESETS = st.sampled_from([sf.HardReset(), sf.HardReset(-0.2, True), sf.SoftReset(), sf.SoftReset(True), sf.NoReset()])
SURROGATES = st.sampled_from([sf.ATan(), sf.Sigmoid(), sf.FastSigmoid(), sf.Triangle(), sf.Rectangle(), sf.Gaussian()])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 11),
    lanes=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    chunk=st.integers(1, 5),
    block=st.sampled_from([16, 64]),
    reset=RESETS,
    surrogate=SURROGATES,
    decay_input=st.booleans(),
    learned=st.booleans(),
)
def test_any_shape_any_option_any_blocks(T, lanes, chunk, block, reset, surrogate, decay_input, learned):
    neuron = sf.LIF(reset, decay_input, surrogate=surrogate)
    _, params, state, xs, _ = cases.make("lif", T=T, lanes=tuple(lanes))
    params = params if learned else sf.LIFParams(0.6, 1.0)
    problem, *_ = check_call(neuron, params, state, xs, None)
    kernels = PallasKernels(problem, Blocks(block, 1, min(chunk, T)), interpret=True)

    def kernel(params, state, xs):
        _, *leaves = check_call(neuron, params if learned else sf.LIFParams(0.6, 1.0), state, xs, None)
        (s,), (v,) = fused.run(fused.KernelPasses(kernels), *leaves)
        return s, sf.LIFState(v)

    def scan(params, state, xs):
        params = params if learned else sf.LIFParams(0.6, 1.0)
        return sf.unroll(neuron, params, state, xs, implementation="scan")

    args = params if learned else (), state, xs

    def with_gradients(f):
        out, vjp = jax.vjp(f, *args)
        return out, vjp(cases.cotangents(out))

    (out, got), (want_out, want) = jax.jit(lambda: (with_gradients(kernel), with_gradients(scan)))()
    assert_same_spikes(out[0], want_out[0])
    assert_close(out[1], want_out[1], 1e-5)
    assert_close(got[1:], want[1:], 1e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(want)) * np.sqrt(T)
    for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0]), strict=True):
        np.testing.assert_allclose(
            a, b, atol=1e-5 * scale
        )  # a sum may cancel, so its error is compared with the scale of its terms


def test_the_reference_of_the_property_test_fires():
    neuron, params, state, xs, _ = cases.make("lif", T=11, lanes=(9, 9, 9))
    assert_fires(sf.unroll(neuron, params, state, xs)[0])
