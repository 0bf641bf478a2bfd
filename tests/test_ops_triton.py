"""The Triton kernels, on a machine that may have neither a GPU nor Triton.

Their text is run by NumPy, compared with a golden text that was reviewed by eye, and compiled to PTX if Triton is installed.
"""

import importlib.util
import os
import pathlib
import re
from dataclasses import dataclass
from functools import partial
from unittest import mock

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_numpy
from compare import assert_close, assert_fires, assert_same_spikes
from jax.extend import core as jex
from jax.sharding import PartitionSpec as P

import snnfuse as sf
from snnfuse.ops import blocks as block_sizes
from snnfuse.ops import fused, triton, triton_equations, triton_source
from snnfuse.ops.blocks import Blocks
from snnfuse.ops.check import check_call
from snnfuse.ops.fused import Wanted

f32, bf16, f16 = jnp.float32, jnp.bfloat16, jnp.float16
GOLDEN = pathlib.Path(__file__).parent / "golden" / "triton_lif.txt"


@pytest.fixture
def numpy_kernels(monkeypatch):
    """NumPy runs the kernels of TritonKernels in place of Triton."""
    triton_on_numpy.install(monkeypatch)
    fused._run.clear_cache()
    yield
    fused._run.clear_cache()


def problem_of(neuron, params, state, xs, out_dtype=None):
    return check_call(neuron, params, state, xs, out_dtype)[0]


def unroll(neuron, blocks, out_dtype, params, state, xs):
    problem, *leaves = check_call(neuron, params, state, xs, out_dtype)
    outs, final = fused.run(fused.KernelPasses(triton.TritonKernels(problem, blocks)), *leaves)
    return problem.out_tree.unflatten(outs), problem.step.state_tree.unflatten(final)


@pytest.mark.parametrize("name", cases.NEURONS)
def test_every_equation_means_the_same(name):
    """The functions `step` and `pullback` of the text, against the jaxprs that they were made from."""
    neuron, *args, _ = cases.make(name, T=1, lanes=(200,))
    problem = problem_of(neuron, *args)
    lanes = (200,)
    wanted = Wanted((True,) * len(problem.param_shapes), (False,) * problem.num_state, (True,) * len(problem.x_dtypes))
    text = triton_source.backward_text(problem, Blocks(200, 1, 1), (200,) * len(wanted.params), wanted, *_live(problem))
    functions = triton_on_numpy.module(text)
    for function, closed in (("step", problem.step_jaxpr(lanes)), ("pullback", problem.full_pullback_jaxpr(lanes))):
        flat = [jnp.broadcast_to(a, (1, *lanes)).reshape(lanes) for a in jax.tree.leaves(args)]
        rest = [jax.random.normal(jax.random.key(i), lanes) for i in range(len(closed.in_avals) - len(flat))]
        want = jex.jaxpr_as_fun(closed)(*flat, *rest)
        got = functions[function](*map(triton_on_numpy.lanes, (*flat, *rest)))
        assert_close([jnp.asarray(g) for g in got], list(want), 2e-6)


def _live(problem):
    return problem.differentiable, (True,) * problem.num_state


CASES = {
    "mask_and_tail": (dict(T=13, lanes=(3, 50)), Blocks(32, 1, 5), None),
    "one_chunk": (dict(T=6, lanes=(2, 64)), Blocks(64, 2, 6), None),
    "whole_chunks": (dict(T=12, lanes=(2, 3, 32)), Blocks(64, 2, 4), None),
    "one_step_chunks": (dict(T=3, lanes=(1,)), Blocks(16, 1, 1), None),
    "prefetch": (dict(T=17, lanes=(2, 40)), Blocks(32, 1, 5, prefetch=True), None),
    "bfloat16": (dict(T=9, lanes=(4, 33), dtype=bf16), Blocks(64, 1, 4, prefetch=True), None),
    "float16": (dict(T=9, lanes=(4, 33), dtype=f16), Blocks(64, 1, 4), f32),
}


def check(name, make, blocks, out_dtype):
    neuron, params, state, xs, rtol = cases.make(name, **make)
    f = partial(unroll, neuron, blocks, out_dtype)
    g = partial(sf.unroll, neuron, implementation="scan", out_dtype=out_dtype)
    out, vjp = jax.vjp(f, params, state, xs)
    want, want_vjp = jax.vjp(g, params, state, xs)
    if jax.tree.leaves(want[0])[0].size > 1000 and name != "li":
        assert_fires(jax.tree.leaves(want[0])[0])
    narrow = {f32: 1.0, bf16: 2**-8, f16: 2**-11}[make.get("dtype", f32)]
    tolerance = rtol if narrow == 1.0 else max(rtol, 2 * narrow)
    assert_close(out[0], want[0], tolerance)
    assert_close(out[1], want[1], rtol)
    cotangents = cases.cotangents(want)
    got, want = vjp(cotangents), want_vjp(cotangents)
    assert_close(got[0], want[0], 10 * tolerance)
    assert_close(got[1:], want[1:], tolerance)


@pytest.mark.parametrize(
    "name, case", [*((n, "mask_and_tail") for n in cases.NEURONS), *(("affine", c) for c in CASES)]
)
def test_whole_kernels_run_by_numpy_give_what_scan_gives(name, case, numpy_kernels):
    check(name, *CASES[case])


@pytest.mark.parametrize("case", ["mask_and_tail", "whole_chunks"])
def test_a_kernel_for_the_state_alone(case, numpy_kernels):
    make, blocks, _ = CASES[case]
    neuron, *args, rtol = cases.make("cuba", **make)
    problem, *leaves = check_call(neuron, *args, None)
    outs, final = fused.run(fused.KernelPasses(triton.TritonKernels(problem.state_only, blocks)), *leaves)
    want = sf.unroll(neuron, *args, implementation="scan")[1]
    assert outs == ()
    assert_close(problem.step.state_tree.unflatten(final), want, rtol)


def test_in_a_shard_map_that_checks_what_varies(numpy_kernels):
    """jax-triton does not mark its results as varying over devices, so snnfuse must."""
    neuron, *args, _ = cases.make("lif", T=6, lanes=(4, 10))

    def gradient(run, params, state, xs):
        out, vjp = jax.vjp(run, params, state, xs)
        return out, vjp(out)

    kernels = partial(gradient, partial(unroll, neuron, Blocks(32, 1, 3), None))
    lanes, time = P("x"), P(None, "x")
    specs = dict(in_specs=(P(), lanes, time), out_specs=((time, lanes), (P(), lanes, time)))
    mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,))
    (spikes, final), gradients = jax.jit(jax.shard_map(kernels, mesh=mesh, **specs))(*args)
    want, want_gradients = gradient(partial(sf.unroll, neuron, implementation="scan"), *args)
    assert_fires(want[0])
    assert_same_spikes(spikes, want[0])
    assert_close((final, gradients), (want[1], want_gradients), 1e-5)


@pytest.mark.parametrize("new", [False, True])
def test_both_versions_of_jax_triton(new, monkeypatch):
    triton_on_numpy.install(monkeypatch, new)
    neuron, *args, _ = cases.make("if", T=3, lanes=(8,))
    unroll(neuron, Blocks(8, 1, 3), None, *args)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bool_, jnp.int32, bf16])
def test_out_dtype(dtype, numpy_kernels):
    neuron, *args, _ = cases.make("lif", T=12, lanes=(3, 40))
    outs, final = unroll(neuron, Blocks(32, 1, 4), dtype, *args)
    want, want_final = sf.unroll(neuron, *args, implementation="scan")
    assert outs.dtype == dtype
    assert_fires(want)
    assert_same_spikes(outs, want)
    assert_close(final, want_final, 1e-6)


@pytest.mark.parametrize("T, blocks", [(5, Blocks(64, 1, 5)), (43, Blocks(32, 1, 32)), (16, Blocks(32, 1, 8))])
@pytest.mark.parametrize("steps", [8, 32])
def test_spikes_as_bits(steps, T, blocks, numpy_kernels):
    if blocks.chunk % steps and blocks.chunk < T:
        blocks = Blocks(64, 1, T)
    neuron, *args, _ = cases.make("outputs", T=T, lanes=(3, 50))
    outs, final = unroll(neuron, blocks, {"spike": sf.Packed(steps), "v": f32}, *args)
    want, want_final = sf.unroll(neuron, *args, implementation="scan")
    assert_fires(want["spike"])
    assert_same_spikes(sf.unpack(outs["spike"], T), want["spike"])
    assert_close((outs["v"], final), (want["v"], want_final), 1e-5)


def test_only_the_gradients_asked_for_and_a_constant_initial_state(numpy_kernels):
    neuron, params, _, xs, _ = cases.make("outputs", T=11, lanes=(2, 40))

    def loss(run, params, xs):
        return (run(params, None, xs)[0]["v"] * xs["current"]).sum()

    kernels = partial(unroll, neuron, Blocks(32, 1, 4), {"spike": jnp.int8, "v": f32})
    scan = partial(sf.unroll, neuron, implementation="scan")
    assert_close(jax.grad(partial(loss, kernels))(params, xs), jax.grad(partial(loss, scan))(params, xs), 1e-5)
    assert_close(jax.grad(partial(loss, kernels), 1)(params, xs), jax.grad(partial(loss, scan), 1)(params, xs), 1e-5)


@pytest.mark.parametrize("shape", [(), (64,), (8, 1, 1)], ids=["scalar", "per channel", "per sample"])
def test_a_program_adds_the_gradients_of_params_over_several_blocks(shape, numpy_kernels, monkeypatch):
    monkeypatch.setattr(block_sizes, "PROGRAMS", 2)
    xs, cotangent = (jax.random.normal(jax.random.key(i), (5, 8, 2, 64)) + 0.3 for i in range(2))
    params = sf.LIFParams(jax.random.uniform(jax.random.key(2), shape, minval=0.3, maxval=0.9), jnp.ones(shape))

    def gradients(run):
        out, vjp = jax.vjp(lambda params, xs: run(params, None, xs)[0], params, xs)
        assert_fires(out)
        return vjp(cotangent)

    got = gradients(partial(unroll, sf.LIF(), Blocks(32, 1, 3), None))
    assert_close(got, gradients(partial(sf.unroll, sf.LIF(), implementation="scan")), 1e-5)


# ---- what a user's step may use


@dataclass(frozen=True)
class Membrane:
    """v[t] = f(decay v[t-1] + x[t]): a neuron made of one function."""

    f: object

    def init_state(self, shape):
        return jnp.zeros(shape, jnp.float32)

    def step(self, params, state, x):
        v = self.f(params * state + x)
        return v, v


FUNCTIONS = {
    "tanh": jnp.tanh,
    "logistic": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "erf": lambda u: u * jax.lax.erf(u),
    "relu": jax.nn.relu,
    "clip": lambda u: jnp.clip(u, -0.5, 0.5),
    "sign": lambda u: jnp.sign(u) * u * u,
    "powers": lambda u: jnp.clip(u, -1, 1) ** 3 - 0.1 * jnp.clip(u, -1, 1) ** 5,
    "reciprocal": lambda u: 1 / (1 + u**2) ** 2,
    "inverse square": lambda u: (1 + jnp.abs(u)) ** -2,
    "power": lambda u: jnp.power(jnp.abs(u) + 0.5, 1.5),
    "rsqrt": lambda u: jax.lax.rsqrt(1 + u * u),
    "sqrt": lambda u: jnp.sqrt(1 + u * u),
    "logs": lambda u: jnp.log1p(jnp.abs(u)) + jnp.log(2 + jnp.abs(u)) + jnp.expm1(-u * u),
    "waves": lambda u: jnp.sin(u) + jnp.cos(2 * u) + jnp.arctan(u),
    "rounding": lambda u: u + 0.1 * (jnp.floor(u) + jnp.ceil(2 * u) + jnp.round(3 * u)),
    "remainder": lambda u: jnp.remainder(u, 1.5),
    "quantized": lambda u: u.astype(bf16).astype(f32),
    "logic": lambda u: jnp.where((u > -0.2) & ~(u > 0.7) | (jnp.abs(u) >= 2.0) & jnp.isfinite(u), u, 0.5 * u),
    "constants": lambda u: jnp.where(u > 0, jnp.full_like(u, 0.25) * 2.0, -1e-40) + u,
    "a constant": lambda u: jnp.full_like(u, 0.5),
}
if jax.__version_info__ >= (0, 12):
    del FUNCTIONS["erf"]  # there JAX computes erf by integer operations on its bits, which no kernel can run


@pytest.mark.filterwarnings("ignore:neuron Membrane. the gradient of its outputs is zero")  # of a constant
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_step_made_of(function, numpy_kernels):
    neuron = Membrane(FUNCTIONS[function])
    params, xs = jnp.full(30, 0.7), jax.random.normal(jax.random.key(0), (7, 2, 30))
    args = params, None, xs
    assert triton.why_not_kernels(problem_of(neuron, *args)) is None
    out, vjp = jax.vjp(lambda p, x: unroll(neuron, Blocks(32, 1, 4), None, p, None, x), params, xs)
    want, want_vjp = jax.vjp(lambda p, x: sf.unroll(neuron, p, None, x, implementation="scan"), params, xs)
    assert_close(out, want, 1e-5)
    cotangents = cases.cotangents(want)
    assert_close(vjp(cotangents), want_vjp(cotangents), 1e-5)


@pytest.mark.parametrize(
    "f, reason",
    [
        (jnp.exp2, "its step uses `exp2`, which has no Triton expression"),
        (lambda u: u.astype(jnp.int32).astype(f32) + u, r"its step computes `convert_element_type` in int32"),
        (lambda u: u - u.mean(), "its step is not pointwise over lanes"),
    ],
)
def test_what_cannot_be_translated_is_named(f, reason, monkeypatch):
    monkeypatch.delitem(triton_equations.TABLE, "exp2")
    problem = problem_of(Membrane(f), jnp.float32(0.5), None, jnp.ones((3, 8)))
    assert f"neuron Membrane: {reason}" in triton.why_not_kernels(problem)


def test_why_not(monkeypatch):
    problem = problem_of(sf.LIF(), sf.LIFParams(), None, jnp.ones((3, 8)))
    assert triton.why_not_kernels(problem) is None
    monkeypatch.setattr(triton, "platform", lambda: "cpu")
    assert triton.TRITON.why_not(problem) == "it needs a GPU, the device is a cpu"
    monkeypatch.setattr(triton, "platform", lambda: "gpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.TRITON.why_not(problem) == 'it needs jax-triton: pip install "snnfuse[triton]"'


# ---- the text


def lif_text():
    _, _, state, xs, _ = cases.make("lif", T=37, lanes=(3, 50))
    problem = problem_of(sf.LIF(), sf.LIFParams(jnp.full(50, 0.7), 1.0), state, xs)
    return triton_source.module_text(problem, Blocks(64, 2, 8), (50,))


def test_the_text_for_lif_is_as_reviewed():
    """To change the golden text, run this with SNNFUSE_WRITE_GOLDEN=1 and review the diff."""
    if os.environ.get("SNNFUSE_WRITE_GOLDEN"):
        GOLDEN.write_text(lif_text())
    got, want = (
        [line for line in text.splitlines() if jax.__version_info__[:2] == (0, 11) or not line.startswith("    #")]
        for text in (lif_text(), GOLDEN.read_text())
    )  # versions of JAX name different source lines for the sum of two cotangents
    assert got == want


@pytest.mark.parametrize("name", cases.NEURONS)
def test_the_text_has_the_neurons_names_and_does_not_grow_with_time(name):
    def text(T):
        neuron, params, xs = structs(name, T, (70000,))
        problems = []
        jax.eval_shape(lambda params, xs: problems.append(problem_of(neuron, params, None, xs)), params, xs)
        return triton.source(problems[0])

    assert text(16 * 4) == text(16 * 256)
    fields = {n for n in re.findall(r"\w+", repr(jax.tree.structure(cases.NEURONS[name][1]))) if n.endswith("decay")}
    assert all(re.search(rf"\b{n}\b", text(16)) for n in fields)
    assert max(map(len, text(16).splitlines())) <= 130


def test_equal_texts_are_one_kernel():
    pytest.importorskip("triton")
    assert triton.kernel(lif_text(), "snn_forward") is triton.kernel(lif_text(), "snn_forward")


def test_layers_of_other_sizes_share_their_kernels_and_their_jaxprs(monkeypatch):
    calls, problems = [], []

    def called(kernel, args, shapes, grid, warps, constants):
        calls.append((*kernel, warps, tuple(constants.items())))
        return [jnp.zeros(s.shape, s.dtype) for s in shapes]

    triton_on_numpy.install(monkeypatch, called=called)
    monkeypatch.setattr(triton, "kernel", lambda text, name: (name, text))
    for T, lanes in ((32, (100, 7, 64)), (64, (30, 256))):
        neuron, params, xs = structs("lif", T, lanes)

        def loss(params, xs, neuron=neuron):
            problem, *leaves = check_call(neuron, params, None, xs, None)
            problems.append(problem)
            kernels = triton.TritonKernels(problem, Blocks(64, 2, 8, prefetch=True))
            return fused.run(fused.KernelPasses(kernels), *leaves)[0][0].sum()

        jax.eval_shape(jax.grad(loss, (0, 1)), params, xs)
    assert {name for name, *_ in calls} == {"snn_forward", "snn_backward"} and len(calls) == 2 * len(set(calls))
    assert problems[0].step_jaxpr((64,)) is problems[-1].step_jaxpr((64,)) and problems[0] != problems[-1]


# ---- PTX

COMPILED = {
    "plain": dict(T=20, lanes=(4096,)),
    "mask_and_tail": dict(T=37, lanes=(3, 50)),
    "prefetch": dict(T=37, lanes=(3, 50), blocks=Blocks(32, 1, 8, prefetch=True)),
    "one_chunk_and_a_tail": dict(T=13, lanes=(3, 50), blocks=Blocks(32, 1, 8, prefetch=True)),
    "bfloat16": dict(T=20, lanes=(4096,), dtype=bf16),
    "float16": dict(T=20, lanes=(4096,), dtype=f16),
    "int8": dict(T=20, lanes=(4096,), out_dtype=jnp.int8),
    "bool": dict(T=20, lanes=(4096,), out_dtype=jnp.bool_),
    "packed": dict(T=43, lanes=(4096,), out_dtype=sf.Packed(8)),
    "packed_32": dict(T=43, lanes=(4096,), out_dtype=sf.Packed(32)),
    "64-bit offsets": dict(T=2**11, lanes=(2**20 + 3,)),
    "64-bit offsets, one chunk and a tail": dict(T=13, lanes=(2**28,)),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "name, case, capability",
    [
        *((n, "mask_and_tail", 90) for n in cases.NEURONS if n != "lif"),
        *(("lif", c, 90) for c in COMPILED),
        *(("lif", c, 80) for c in ("mask_and_tail", "bfloat16", "packed")),
    ],
)
def test_compiles_to_ptx(name, case, capability, monkeypatch):
    make = dict(COMPILED[case])
    out_dtype = make.pop("out_dtype", None)
    for ptx in compiled(name, make, out_dtype, capability, monkeypatch):
        assert f".target sm_{capability}" in ptx and ".visible .entry snn_" in ptx
        assert ".local" not in ptx


def compiled(name, make, out_dtype, capability, monkeypatch):
    """The PTX of the forward and the backward kernel of one call, compiled as jax-triton would."""
    blocks = make.pop("blocks", Blocks(128, 4, min(8, make["T"])))
    neuron, params, xs = structs(name, **make)
    ptx = []

    def called(kernel, args, shapes, grid, warps, constants):
        ptx.append(to_ptx(kernel, args, shapes, warps, constants, capability))
        return [jnp.zeros(s.shape, s.dtype) for s in shapes]

    def gradient(params, xs, cotangents):
        out, vjp = jax.vjp(run, params, xs)
        return vjp(cotangents)

    def run(params, xs):
        problem, *leaves = check_call(neuron, params, None, xs, out_dtype)
        return fused.run(fused.KernelPasses(triton.TritonKernels(problem, blocks)), *leaves)

    triton_on_numpy.install(monkeypatch, called=called)
    fused._run.clear_cache()
    out = jax.eval_shape(run, params, xs)
    del ptx[:]
    float0 = lambda o: o if jnp.issubdtype(o.dtype, jnp.floating) else np.zeros(o.shape, jax.dtypes.float0)
    jax.eval_shape(gradient, params, xs, jax.tree.map(float0, out))
    fused._run.clear_cache()
    return ptx


def structs(name, T, lanes, dtype=f32):
    neuron, params, _, xs, _ = cases.make(name, T=2, lanes=(3, 50))
    params = jax.tree.map(lambda _: jax.ShapeDtypeStruct(lanes[-1:], f32), params)
    return neuron, params, jax.tree.map(lambda _: jax.ShapeDtypeStruct((T, *lanes), dtype), xs)


TYPES = dict(
    float32="fp32", bfloat16="bf16", float16="fp16", int8="i8", uint8="u8", int32="i32", uint32="u32", bool="i1"
)


def to_ptx(kernel, args, shapes, warps, constants, capability):
    """Compile with Triton itself, with the types and the alignment that jax-triton would pass. This needs no device."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = ["i32" if isinstance(a, int) else "*" + TYPES[str(a.dtype)] for a in (*args, *shapes)]
    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    assert signature.keys() == set(kernel.arg_names)
    signature = {name: signature[name] for name in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if t != "i32"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    target = GPUTarget("cuda", capability, 32)
    options = dict(num_warps=warps, num_stages=1, enable_fp_fusion=True)
    cache = (
        pathlib.Path(__file__).parents[1] / ".pytest_cache" / "triton"
    )  # jax-triton sets an empty name, which Triton refuses
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(cache)):
        made = compile(source, target=target, options=options)
    assert made.metadata.shared <= 227 * 1024, "more shared memory than an H100 has"
    return made.asm["ptx"]
