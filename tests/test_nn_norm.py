"""Layers of convolutional networks: fused against unfused normalisation, packed spikes, convolutions, pooling."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_fires, assert_same_spikes
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

import snnfuse as sf
from snnfuse import nn
from snnfuse.core.compose import CONNECTIONS
from snnfuse.nn.convolution import convolve
from snnfuse.nn.spikes import values

strict = pytest.mark.usefixtures("strict")

ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("pallas", "triton")]

T, B, H, N = 6, 3, 2, 4
# (normalisation of xs; shortcut: none, a sequence, or a normalised sequence; how it is connected to the neuron)
LAYERS = {
    "alone": ({}, None, "sum"),
    "tdBN": (dict(gain=0.7), None, "sum"),
    "per_step": (dict(per_step=True), None, "sum"),
    "shortcut": ({}, "as it is", "sum"),
    "shortcut_norm": ({}, "normalised", "sum"),
    "add": ({}, "as it is", "add"),
    "and": (dict(gain=0.7), "as it is", "and"),
    "iand": ({}, "as it is", "iand"),
}


def batch_norm(seed, **options):
    """A BatchNorm whose scale, bias and running averages differ from their initial values."""
    norm = nn.BatchNorm(N, rngs=nnx.Rngs(0), **options)
    keys = jax.random.split(jax.random.key(seed), 4)
    for variable, key in zip((norm.scale, norm.bias, norm.mean, norm.var), keys, strict=True):
        variable[...] = jax.random.uniform(key, (N,), minval=0.5, maxval=1.5)
    norm.bias[...] = norm.bias[...] - 1.0
    return norm


def make(name, implementation="scan", dtype=jnp.float32, pack=False, **more):
    """(layer, xs, shortcut)"""
    options, shortcut, connect = LAYERS[name]
    lif = nn.LIF(decay=0.6, threshold=0.6, learn=("decay", "threshold"), shape=(N,), implementation=implementation)
    shortcut_norm = batch_norm(1) if shortcut == "normalised" else None
    layer = nn.NormSpiking(
        lif, batch_norm(0, **options), shortcut_norm=shortcut_norm, connect=connect, pack=pack, **more
    )
    keys = jax.random.split(jax.random.key(7), 2)
    xs = (2 * jax.random.normal(keys[0], (T, B, H, N)) + 0.5).astype(dtype)
    r = jax.random.normal(keys[1], xs.shape)
    r = 0.5 * r if connect == "sum" else (r > 0).astype(jnp.float32)
    return layer, xs, None if shortcut is None else r.astype(dtype)


@pytest.mark.parametrize("implementation", ["scan", "interpret", *ON_GPU])
def test_drop_path_drops_the_spikes_of_whole_samples(implementation):
    """In training outs = gate spikes + shortcut, with a gate of 0 or 1 / (1 - rate) for each sample; later the gate is 1."""
    layer, xs, shortcut = make("add", implementation)
    dropping, *_ = make("add", implementation, drop_path=nnx.Dropout(0.25, rngs=nnx.Rngs(0)))
    xs, shortcut = jnp.tile(xs, (1, 8, 1, 1)), jnp.tile(shortcut, (1, 8, 1, 1))

    @partial(jax.jit, static_argnums=0)
    def run(graphdef, state, d_outs):
        outs, vjp = jax.vjp(lambda xs, r: nnx.merge(graphdef, state, copy=True)(xs, None, r)[0], xs, shortcut)
        return outs, vjp(d_outs)

    cotangents = jax.random.normal(jax.random.key(1), xs.shape)
    plain, _ = run(*nnx.split(layer), cotangents)
    outs, gradients = run(*nnx.split(dropping), cotangents)
    gate = (outs - shortcut).max((0, 2, 3), keepdims=True)
    assert_fires(plain - shortcut)
    assert (
        set(np.round(np.asarray(gate).ravel(), 4).tolist()) == {0, np.float32(1.3333)} and 12 <= (gate > 0).sum() < 24
    )
    np.testing.assert_allclose(outs, gate * (plain - shortcut) + shortcut, rtol=1e-6)
    _, (d_xs, _) = run(*nnx.split(layer), cotangents * gate)
    assert_close(gradients, (d_xs, cotangents), 1e-5)
    dropping.drop_path.deterministic = True
    np.testing.assert_array_equal(run(*nnx.split(dropping), cotangents)[0], plain)


def unfused(layer, xs, state, shortcut):
    """The same layer in three parts: BatchNorm, shortcut, neuron by scan. In float32, except with statistics per step."""
    dtype = xs.dtype
    current = layer.norm(xs if layer.norm.per_step else xs.astype(jnp.float32)).astype(jnp.float32)
    r = None if shortcut is None else shortcut.astype(jnp.float32)
    if r is not None and layer.connect == "sum":
        current = current + (r if layer.shortcut_norm is None else layer.shortcut_norm(r))
    outs, state = sf.unroll(layer.neuron.neuron, layer.neuron.params, state, current, implementation="scan")
    if layer.connect != "sum":
        outs = CONNECTIONS[layer.connect](outs, r)
    return outs.astype(dtype), state


def gradients(call, layer, xs, shortcut):
    """(outs, state), gradients of the parameters, xs and shortcut under random cotangents, and the running averages."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    state = jax.ShapeDtypeStruct((B, H, N), jnp.float32)
    cotangents = cases.cotangents((jax.ShapeDtypeStruct(xs.shape, xs.dtype), sf.LIFState(state)))

    @jax.jit
    def run(params, rest, xs, shortcut, cotangents):
        def f(params, xs, shortcut):
            layer = nnx.merge(graphdef, params, rest, copy=True)
            return call(layer, xs, None, shortcut), nnx.state(layer, nnx.BatchStat)

        out, vjp, averages = jax.vjp(f, params, xs, shortcut, has_aux=True)
        return out, vjp(cotangents), averages

    return run(params, rest, xs, shortcut, cotangents)


RUNS = [(name, *how, "train") for name in LAYERS for how in (("scan", "float32"), ("interpret", "bfloat16"))]
RUNS += [
    ("shortcut_norm", "interpret", "float32", "eval"),
    ("per_step", "scan", "float32", "eval"),
    ("iand", "scan", "bfloat16", "eval"),
]
RUNS += [
    pytest.param(name, how, dtype, "train", marks=pytest.mark.gpu)
    for name in LAYERS
    for how, dtype in (
        ("pallas", "float32"),
        ("triton", "float32" if name == "per_step" else "bfloat16"),
    )  # XLA rounds its current
]


@strict
@pytest.mark.parametrize("name, implementation, dtype, mode", RUNS)
def test_norm_spiking_is_norm_then_shortcut_then_neuron(name, implementation, dtype, mode):
    """Compare spikes exactly, and the state, every gradient and the running averages to rounding."""
    layer, xs, shortcut = make(name, implementation, jnp.dtype(dtype))
    getattr(layer, mode)()
    (outs, state), (d_params, d_xs, d_shortcut), averages = gradients(nn.NormSpiking.__call__, layer, xs, shortcut)
    want, (want_params, want_xs, want_shortcut), want_averages = gradients(unfused, layer, xs, shortcut)
    assert_fires(want[0], high=0.9)
    assert_same_spikes(outs, want[0])
    assert_close(state, want[1], 1e-5)
    assert_close(averages, want_averages, 1e-6)
    assert_close(d_params, want_params, 1e-5)
    rounding = 1e-5 if dtype == "float32" else 2**-7  # of sums of two or three numbers in 16 bits
    assert_close((d_xs, d_shortcut), (want_xs, want_shortcut), rounding)
    for path, gradient in nnx.to_flat_state(d_params):
        assert jnp.all(gradient[...] != 0), f"no gradient reaches {path}"


@strict
def test_pack_gives_the_same_spikes_and_their_bits():
    (layer, xs, _), (packing, _, _) = make("alone", "interpret"), make("alone", "interpret", pack=True)
    want, d_want, _ = gradients(nn.NormSpiking.__call__, layer, xs, None)

    def call(layer, xs, state, shortcut):
        outs, state = layer(xs, state, shortcut)
        assert isinstance(outs, nn.Spikes) and outs.bits.dtype == jnp.uint8 and outs.bits.shape == (1, B, H, N)
        same = jnp.array_equal(sf.unpack(outs.bits, T, outs.values.dtype), outs.values)
        return jnp.where(same, outs.values, jnp.nan), state

    got, d_got, _ = gradients(call, packing, xs, None)
    assert_fires(want[0])
    assert_close((got, d_got), (want, d_want), 0.0)


@strict
def test_gain_and_per_step_by_hand():
    x = np.asarray(make("alone")[1], np.float64)
    for axes, options in (((0, 1, 2), dict(gain=0.7)), ((1, 2), dict(per_step=True, gain=1.0))):
        norm = batch_norm(0, **options)
        want = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
        want = want * options["gain"] * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
        np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), want, rtol=1e-4, atol=1e-5)


def test_running_averages_are_those_of_torch():
    """PyTorch: running = 0.9 running + 0.1 now, with the variance over n - 1; the normalisation itself divides by n."""
    norm, xs = nn.BatchNorm(N, rngs=nnx.Rngs(0)), make("alone")[1]
    norm.eval()
    np.testing.assert_allclose(norm(xs), xs / np.sqrt(1 + 1e-5), rtol=1e-6)  # before any training: mean 0, variance 1
    norm.train()
    mean, var = np.zeros(N), np.ones(N)
    for i in range(3):
        x = np.asarray(xs, np.float64) * (i + 1)
        norm(jnp.asarray(x, jnp.float32))
        mean = 0.9 * mean + 0.1 * x.reshape(-1, N).mean(0)
        var = 0.9 * var + 0.1 * x.reshape(-1, N).var(0, ddof=1)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)
    norm.eval()
    np.testing.assert_allclose(norm(xs), (xs - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5)


@strict
@pytest.mark.parametrize("shape", [(6, 5, 4, 4, 3), (8, 30, 3)])
@pytest.mark.parametrize("ratio", [0.0, 300.0, 4096.0])
@pytest.mark.parametrize("per_step", [False, True])
def test_statistics_keep_their_digits_beside_a_large_mean(per_step, ratio, shape):
    """mean / deviation of 300 and 4096, against float64; E[x^2] - E[x]^2 in float32 loses all digits at 4096."""
    xs = (jax.random.normal(jax.random.key(0), shape) + ratio).at[0].add(1.0)
    axes = tuple(range(int(per_step), len(shape) - 1))
    x = np.asarray(xs, np.float64)
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    norm = nn.BatchNorm(3, per_step=per_step, rngs=nnx.Rngs(0))
    d = jax.random.normal(jax.random.key(1), shape)

    @jax.jit
    def run(xs, d):
        fresh = lambda: nnx.clone(norm)
        return fresh().affine(xs)[0], fresh()(xs), jax.grad(lambda xs: (fresh()(xs) * d).sum())(xs)

    scale, outs, got = run(xs, d)
    np.testing.assert_allclose(scale, 1 / np.sqrt(var + 1e-5).reshape(scale.shape), rtol=1e-4)
    np.testing.assert_allclose(outs, (x - mean) / np.sqrt(var + 1e-5), atol=1e-5 + 1e-6 * ratio)
    y, d = (x - mean) / np.sqrt(var + 1e-5), np.asarray(d, np.float64)
    want = (d - d.mean(axes, keepdims=True) - y * (d * y).mean(axes, keepdims=True)) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(got, want, atol=2e-5 + 2e-6 * ratio)


@pytest.mark.parametrize("per_step", [False, True])
def test_axis_name_shares_statistics(per_step):
    """Three shards of one sample each, under vmap, give the spikes, gradients and running averages of the whole batch."""
    layer, xs, _ = make("alone")
    layer.norm.per_step = per_step
    want, (d_params, d_xs, _), averages = gradients(nn.NormSpiking.__call__, layer, xs, None)
    cotangent = jax.tree.map(lambda c: jnp.moveaxis(c, -3, 0)[..., None, :, :], cases.cotangents(want))
    layer.norm.axis_name = "devices"
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def shard(params, x, cotangent):
        def f(params, x):
            layer = nnx.merge(graphdef, params, rest, copy=True)
            return layer(x), nnx.state(layer, nnx.BatchStat)

        out, vjp, averages = jax.vjp(f, params, x, has_aux=True)
        d_params, d_x = vjp(cotangent)
        return out[0], averages, lax.psum(d_params, "devices"), d_x

    shards = jnp.moveaxis(xs, 1, 0)[:, :, None]
    outs, now, got_params, got_xs = jax.jit(jax.vmap(partial(shard, params), axis_name="devices"))(shards, cotangent)
    assert_fires(want[0])
    assert_same_spikes(jnp.moveaxis(outs[:, :, 0], 0, 1), want[0])
    first = partial(jax.tree.map, lambda leaf: leaf[0])
    assert_close(first(now), averages, 1e-5)
    assert_close(first(got_params), d_params, 1e-5)
    assert_close(jnp.moveaxis(got_xs[:, :, 0], 0, 1), d_xs, 1e-5)


def random_spikes(*shape, seed=0, dtype=jnp.float32):
    return jax.random.bernoulli(jax.random.key(seed), 0.3, shape).astype(dtype)


@strict
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", ["conv", "linear", "dense conv", "circular conv"])
def test_layers_on_spikes_keep_bits_and_give_the_same(layer, dtype):
    rngs = nnx.Rngs(0)
    if layer == "linear":
        layer, xs = nn.Linear(5, 4, dtype=dtype, rngs=rngs), random_spikes(40, B, 5)
    else:
        size = 2 if layer == "dense conv" else 6
        padding = "CIRCULAR" if layer == "circular conv" else 1
        layer = nn.Conv(5, 4, (3, 3), 2, padding=padding, dtype=dtype, rngs=rngs)
        xs = random_spikes(9, B, size, size, 5)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @partial(jax.jit, static_argnums=2)
    def run(params, xs, wrap):
        f = lambda params, xs: nnx.merge(graphdef, params, rest)(wrap(xs))
        out, vjp = jax.vjp(f, params, xs)
        return (out, *vjp(cases.cotangents(out))), vjp

    (want, _), (got, vjp) = run(params, xs, lambda xs: xs), run(params, xs, lambda xs: nn.Spikes(xs, sf.pack(xs, 8)))
    assert want[0].dtype == dtype and float(jnp.abs(want[2]).max()) > 0
    assert_close(got, want, 0.0)
    assert all(leaf.size < xs.size for leaf in jax.tree.leaves(vjp)), "the values are stored"


def block(memory, implementation):
    """conv, neuron, conv, neuron on 4 channels, with spikes stored as bits or numbers, or the whole block recomputed."""
    rngs, pack = nnx.Rngs(0), memory != "fast"
    lif = lambda: nn.LIF(decay=0.5, threshold=0.6, learn="decay", implementation=implementation)
    spiking = lambda: nn.NormSpiking(lif(), nn.BatchNorm(4, rngs=rngs), pack=pack)
    layers = [layer for _ in range(2) for layer in (nn.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs), spiking())]
    layer = nn.Sequential(*layers)
    return nn.Remat(layer) if memory == "lean" else layer


def vjp_of_block(memory, implementation):
    """(its parameters, (params, xs) -> (outs, state), vjp, running averages)"""
    graphdef, params, rest = nnx.split(block(memory, implementation), nnx.Param, ...)

    def f(params, xs):
        layer = nnx.merge(graphdef, params, rest, copy=True)
        outs, state = layer(xs if memory == "fast" else nn.Spikes.of(xs))
        return (values(outs), state), nnx.state(layer, nnx.BatchStat)

    return params, lambda params, xs: jax.vjp(f, params, xs, has_aux=True)


def test_packed_stores_less_and_lean_still_less():
    xs = jax.ShapeDtypeStruct((16, 2, 8, 8, 4), jnp.float32)
    sequence, kept = xs.size * 4, {}
    for memory in ("fast", "packed", "lean"):
        params, vjp = vjp_of_block(memory, "interpret")
        residuals = lambda *args, vjp=vjp: list({id(leaf): leaf for leaf in jax.tree.leaves(vjp(*args)[1])}.values())
        kept[memory] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.eval_shape(residuals, params, xs))
    small = sequence / 2  # kernels, states, and bits, 1 / 32 of the sequence
    assert 4 * sequence <= kept["fast"] < 4 * sequence + small, "two inputs and two outputs of convolutions"
    assert 2 * sequence <= kept["packed"] < 2 * sequence + small, "two outputs of convolutions; the spikes as bits"
    assert sequence / 32 <= kept["lean"] < small, "the bits of the input"


def test_packed_and_remat_change_no_result():
    xs, results = random_spikes(8, 2, 4, 4, 4), []
    for memory in ("fast", "packed", "lean"):
        params, vjp_of = vjp_of_block(memory, "scan")

        @jax.jit
        def run(params, xs, vjp_of=vjp_of):
            out, vjp, averages = vjp_of(params, xs)
            d_params, d_xs = vjp(cases.cotangents(out))
            return out, jax.tree.leaves(d_params), d_xs, jax.tree.leaves(averages)

        results.append(run(params, xs))
    assert_fires(results[0][0][0])
    assert_close(results[1], results[0], 1e-5)
    assert_close(results[2], results[0], 1e-5)


def conv_and_gradients(f, x, kernel):
    y, vjp = jax.vjp(f, x, kernel)
    return (y, *vjp(cases.cotangents(y)))


@strict
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    taps=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*2 * [st.tuples(st.integers(0, 3), st.integers(0, 3))]),
    inputs=st.integers(1, 4),
)
@example(sizes=(2, 2), taps=(3, 3), strides=(1, 1), pads=((1, 1), (1, 1)), inputs=3)  # a matrix
@example(sizes=(1, 2), taps=(5, 3), strides=(2, 2), pads=((2, 2), (2, 2)), inputs=2)
@example(sizes=(1, 2), taps=(5, 3), strides=(1, 2), pads=((2, 3), (0, 1)), inputs=2)
@example(sizes=(5, 4), taps=(1, 1), strides=(2, 2), pads=((0, 0), (0, 0)), inputs=7)  # 1 x 1
@example(sizes=(8, 12), taps=(7, 7), strides=(2, 2), pads=((3, 3), (3, 3)), inputs=3)  # pixels to channels
@example(sizes=(8, 12), taps=(3, 3), strides=(2, 2), pads=((0, 1), (0, 1)), inputs=3)  # "SAME"
@example(sizes=(9, 6), taps=(2, 4), strides=(3, 1), pads=((1, 0), (1, 2)), inputs=1)
@example(sizes=(7, 6), taps=(3, 3), strides=(2, 2), pads=((1, 1), (1, 1)), inputs=5)  # lax's convolution
@example(sizes=(7, 6), taps=(3, 3), strides=(1, 1), pads=((-1, 1), (1, 0)), inputs=5)
def test_each_form_of_a_convolution_gives_the_same(sizes, taps, strides, pads, inputs):
    x = jax.random.normal(jax.random.key(0), (2, *sizes, inputs))
    kernel = jax.random.normal(jax.random.key(1), (*taps, inputs, 3))
    highest = lax.Precision.HIGHEST
    if any(size + sum(pad) < t for size, pad, t in zip(sizes, pads, taps, strict=True)):
        with pytest.raises(ValueError, match="kernel.*map of"):
            convolve(x, kernel, strides, pads)
        return

    def reference(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=numbers, precision=highest)

    ours = partial(convolve, strides=strides, pads=pads, precision=highest)
    got, want = jax.jit(lambda *args: [conv_and_gradients(f, *args) for f in (ours, reference)])(x, kernel)
    scale = max(1.0, float(jnp.abs(want[2]).max()))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * scale)


FLAX = [
    (nnx.Conv, nn.Conv, (4, 6, (3, 3)), {}, (2, 3, 5, 6, 4)),
    (nnx.Conv, nn.Conv, (4, 6, 3), dict(padding="CAUSAL", kernel_dilation=2), (2, 5, 4)),
    (nnx.Conv, nn.Conv, (4, 6, (3, 2), 2), dict(padding="CIRCULAR", use_bias=False), (2, 3, 5, 6, 4)),
    (nnx.Conv, nn.Conv, (4, 6, (3, 3), (2, 1)), dict(padding="REFLECT", dtype="bfloat16"), (1, 5, 6, 4)),
    (nnx.Conv, nn.Conv, (4, 6, (3, 3)), dict(padding=[(0, 1), 2], feature_group_count=2), (1, 5, 6, 4)),
    (nnx.Conv, nn.Conv, (4, 6, (3, 3)), dict(padding=1, input_dilation=2, param_dtype="bfloat16"), (1, 5, 6, 4)),
    (nnx.Conv, nn.Conv, (4, 6, (3, 3), None), dict(padding="VALID", kernel_dilation=(1, 2)), (5, 6, 4)),
    (nnx.Conv, nn.Conv, (2, 3, (2, 2, 2)), dict(strides=2), (1, 4, 4, 5, 2)),
    (
        nnx.Conv,
        nn.Conv,
        (1, 2, (2, 2)),
        dict(mask=jnp.eye(2).reshape(2, 2, 1, 1) * jnp.ones((1, 1, 1, 2))),
        (1, 4, 4, 1),
    ),
    (nnx.Conv, nn.Conv, (4, 6, (1, 1)), dict(bias_init=nnx.initializers.ones, dtype="float16"), (1, 5, 6, 4)),
    (nnx.Linear, nn.Linear, (4, 6), {}, (2, 3, 4)),
    (nnx.Linear, nn.Linear, (4, 6), dict(use_bias=False, dtype="bfloat16"), (4,)),
    (nnx.Linear, nn.Linear, (4, 6), dict(bias_init=nnx.initializers.normal(), param_dtype="bfloat16"), (3, 4)),
]


@pytest.mark.parametrize("flax, ours, args, options, shape", FLAX)
def test_conv_and_linear_are_those_of_flax(flax, ours, args, options, shape):
    """The same arguments give the same variables, values, dtype and gradients; so do bits in place of spikes."""
    a, b = (make(*args, **options, precision="highest", rngs=nnx.Rngs(3)) for make in (flax, ours))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(a)), nnx.to_pure_dict(nnx.state(b)))
    spikes = random_spikes(*shape)

    @nnx.jit
    def run(layer, x):
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
        y, vjp = jax.vjp(lambda params: nnx.merge(graphdef, params, rest)(x), params)
        return y, *jax.tree.leaves(vjp(cases.cotangents(y)))

    want, *others = run(a, spikes), run(b, spikes), run(b, nn.Spikes.of(spikes))
    for got in others:
        assert [leaf.dtype for leaf in got] == [leaf.dtype for leaf in want]
        tolerance = 1e-5 if want[0].dtype == jnp.float32 else 0.05
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(
                *(np.asarray(leaf, np.float32) for leaf in (g, w)), atol=tolerance, rtol=tolerance
            )


@strict
def test_a_stem_on_bools_stores_only_the_bools():
    """A ResNet's stem stores neither its input in the dtype of the products, nor the pixels moved into channels."""
    xs = random_spikes(2, 3, 8, 8, 3)
    stem = nn.Conv(3, 4, (7, 7), 2, padding=3, use_bias=False, dtype="bfloat16", rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(stem)
    run = jax.jit(lambda xs: jax.vjp(lambda params: nnx.merge(graphdef, params)(xs), params))
    (got, vjp), (want, vjp_of_floats) = run(xs > 0), run(xs)
    cotangent = jax.random.normal(jax.random.key(1), want.shape, want.dtype)
    np.testing.assert_array_equal(got, want)
    for a, b in zip(*map(jax.tree.leaves, (vjp(cotangent), vjp_of_floats(cotangent))), strict=True):
        np.testing.assert_array_equal(a, b)
    kept = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size >= xs.size]
    assert [(leaf.dtype, leaf.size) for leaf in kept] == [(jnp.bool_, xs.size)]


@strict
@pytest.mark.parametrize("computed_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [bool, jnp.uint8, jnp.int32, jnp.float16])
def test_layers_take_small_numbers_of_any_dtype(dtype, computed_in):
    """In each form of a convolution, and in a dense layer."""
    xs = jax.random.randint(jax.random.key(0), (2, 3, 4, 4, 3), 0, 2)
    options = dict(dtype=computed_in, rngs=nnx.Rngs(0))
    layers = [nn.Linear(3, 4, **options)]
    for size, stride in ((7, 2), (3, 2), (3, 1), (1, 2)):
        layers.append(nn.Conv(3, 4, (size, size), stride, padding=(size - 1) // 2, **options))
    run = jax.jit(lambda xs: [layer(xs) for layer in layers])
    for got, want in zip(run(xs.astype(dtype)), run(xs.astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(got, want)


@strict
@pytest.mark.parametrize("window, stride, padding", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 0), (5, 2, 2)])
def test_max_pool_is_reduce_window(window, stride, padding):
    """Compare values, and the gradient, which goes to the first of equal values: nearly all windows of spikes have a tie."""

    def reference(x):
        ones, pads = lambda n: (1, n, n, 1), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, ones(window), ones(stride), pads)

    def with_gradient(f, x):
        outs, vjp = jax.vjp(f, x)
        return outs, vjp(cases.cotangents(outs))

    ours = partial(nn.max_pool, window=window, stride=stride, padding=padding)
    run = jax.jit(lambda x: (with_gradient(ours, x), with_gradient(reference, x)))
    for x in (random_spikes(2, 7, 8, 3), jax.random.normal(jax.random.key(0), (2, 7, 8, 3))):
        (got, gradient), (want, want_gradient) = run(x)
        np.testing.assert_array_equal(got, want)
        assert_close(gradient, want_gradient, 1e-6)


def norm_spiking(neuron=None, norm=None, **options):
    rngs = nnx.Rngs(0)
    return nn.NormSpiking(neuron or nn.IF(implementation="scan"), norm or nn.BatchNorm(4, rngs=rngs), **options)


conv = partial(nn.Conv, rngs=nnx.Rngs(0))
ones = jnp.ones((3, 2, 4))
image = jnp.ones((1, 4, 4, 1))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: norm_spiking()(ones, None, jnp.ones((3, 2, 5))),
            ValueError,
            r"shortcut .*\(3, 2, 4\); got \(3, 2, 5\)",
        ),
        (
            lambda: norm_spiking()(ones, None, jnp.ones((2, 2, 4))),
            ValueError,
            r"shortcut .*\(3, 2, 4\); got \(2, 2, 4\)",
        ),
        (lambda: norm_spiking(connect="add")(ones), ValueError, "shortcut must be given.*got None"),
        (lambda: norm_spiking()(jnp.ones((3, 2, 5))), ValueError, r"xs must be \[T, B, ..., 4\]; got \(3, 2, 5\)"),
        (lambda: norm_spiking()(jnp.ones((3, 4))), ValueError, r"xs must be \[T, B, ..., 4\]; got \(3, 4\)"),
        (lambda: norm_spiking()(jnp.ones((3, 0, 4))), ValueError, r"xs must have no empty axis; got \(3, 0, 4\)"),
        (lambda: norm_spiking()(ones.astype(jnp.int32)), TypeError, "xs must be floating; got int32"),
        (
            lambda: norm_spiking()(ones, None, ones.astype(jnp.int8)),
            TypeError,
            "xs.* must be float32, bfloat16.*got int8",
        ),
        (
            lambda: norm_spiking(norm=nnx.BatchNorm(4, rngs=nnx.Rngs(0))),
            TypeError,
            "norm must be .*RMSNorm; got BatchNorm",
        ),
        (lambda: norm_spiking(shortcut_norm=nnx.relu), TypeError, "shortcut_norm must be .*RMSNorm; got"),
        (lambda: norm_spiking(neuron=nnx.relu), TypeError, "neuron must be .*Spiking"),
        (lambda: norm_spiking(connect="add", pack=True), ValueError, "pack must be False.*got connect='add'"),
        (lambda: norm_spiking(nn.LI(tau=2.0), pack=True), ValueError, "pack must be False.*neuron LI"),
        (lambda: nn.BatchNorm(4, momentum=3, rngs=nnx.Rngs(0)), ValueError, r"momentum must be in \[0, 1\]; got 3"),
        (lambda: conv(1, 1, (3, 0)), ValueError, r"kernel_size must be a positive integer.*2 axes; got \(3, 0\)"),
        (lambda: conv(1, 1, (3, 3), 0), ValueError, "strides must be a positive integer.*got 0"),
        (lambda: conv(1, 1, (3, 3), (1, 1, 1)), ValueError, r"strides must be .*2 axes; got \(1, 1, 1\)"),
        (lambda: conv(1, 1, (3, 3), padding="same"), ValueError, "padding must be SAME.*got 'same'"),
        (lambda: conv(1, 1, (3, 3), padding="CAUSAL"), ValueError, r"padding 'CAUSAL' is for 1-D.*got .*\(3, 3\)"),
        (lambda: conv(1, 1, (3, 3), padding=(1, 1, 1)), ValueError, r"Invalid padding format: \(1, 1, 1\)"),
        (lambda: conv(1, 1, (3, 3), input_dilation=2), ValueError, "padding must be numbers.*got 'SAME'"),
        (lambda: conv(4, 6, (3, 3), feature_group_count=4), ValueError, "feature_group_count must divide.*got 4"),
        (lambda: conv(1, 1, (3, 3), mask=ones), ValueError, r"mask .*kernel, \(3, 3, 1, 1\); got \(3, 2, 4\)"),
        (lambda: conv(1, 1, (3, 3), promote_dtype=None), TypeError, "unexpected keyword argument 'promote_dtype'"),
        (lambda: nn.max_pool(jnp.ones((1, 20, 20, 1)), window=16), ValueError, "max_pool: .*window <= 15.*window 16"),
        (
            lambda: norm_spiking(drop_path=nnx.Dropout(0.1, rngs=nnx.Rngs(0))),
            ValueError,
            "drop_path goes with connect='add'; got connect='sum'",
        ),
        (
            lambda: norm_spiking(connect="add", drop_path=0.1),
            TypeError,
            "drop_path must be an nnx.Dropout, or None; got 0.1",
        ),
        (
            lambda: norm_spiking(norm=nnx.LayerNorm(4, reduction_axes=(-2, -1), rngs=nnx.Rngs(0))),
            ValueError,
            r"norm must have reduction_axes=-1; got \(-2, -1\)",
        ),
        (
            lambda: norm_spiking(norm=nnx.RMSNorm(4, rngs=nnx.Rngs(0)))(jnp.ones((3, 2, 5))),
            ValueError,
            r"xs must be \[T, B, ..., 4\] without an empty axis; got \(3, 2, 5\)",
        ),
        (lambda: norm_spiking(connect="or"), ValueError, "must be one of .*add, and, iand; got 'or'"),
        (
            lambda: norm_spiking(connect="add", shortcut_norm=nn.BatchNorm(4, rngs=nnx.Rngs(0))),
            ValueError,
            "shortcut_norm goes with connect='sum'; got connect='add'",
        ),
        (lambda: nn.PrecisionPolicy("fp16"), ValueError, "policy must be one of.*got 'fp16'"),
        (lambda: conv(3, 1, (3, 3))(image), ValueError, r"x must be \[..., H, W, 3\].*got \(1, 4, 4, 1\)"),
        (lambda: conv(1, 1, (7, 7), padding=0)(image), ValueError, r"kernel, \(7, 7\).*map of \(4, 4\)"),
        (lambda: nn.Linear(3, 1, rngs=nnx.Rngs(0))(image), ValueError, r"x must be \[..., 3\]; got \(1, 4, 4, 1\)"),
        (lambda: nn.max_pool(image, window=5, padding=0), ValueError, "max_pool: x must be.*window 5"),
        (lambda: nn.max_pool(image, window=2, padding=2), ValueError, "max_pool: .*padding < window.*padding 2"),
        (lambda: nn.max_pool(image, stride=0), ValueError, "max_pool: .*stride >= 1.*stride 0"),
        (lambda: nn.max_pool(image[0]), ValueError, r"max_pool: x must be \[n, H, W, C\].*got \(4, 4, 1\)"),
        (lambda: nn.mean_pool(jnp.ones((4, 4))), ValueError, r"x must be \[..., H, W, C\].*got \(4, 4\)"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


ROWS = {
    "LayerNorm": partial(nnx.LayerNorm, use_fast_variance=False),
    "RMSNorm": nnx.RMSNorm,
    "plain": partial(nnx.RMSNorm, use_scale=False),
}
ROWS |= {"TEBN": lambda N, rngs: nn.TEBN(T, N, rngs=rngs)}


@pytest.mark.parametrize(
    "name, implementation",
    [(name, "scan") for name in ROWS]
    + [("LayerNorm", "interpret"), ("RMSNorm", "interpret")]
    + [pytest.param(name, how, marks=pytest.mark.gpu) for name in ROWS for how in ("pallas", "triton")],
)
def test_norm_spiking_with_statistics_of_each_step_is_norm_then_neuron(name, implementation):
    """Values, state and all gradients, in float64 by scan; TEBN has statistics in float32."""
    double = implementation == "scan" and name != "TEBN"
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        norms = [ROWS[name](N, rngs=nnx.Rngs(0)) for _ in range(1 if name == "TEBN" else 2)]
        lif = nn.LIF(decay=0.6, threshold=0.9, learn="decay", implementation=implementation)
        layer = nn.NormSpiking(lif, norms[0], shortcut_norm=norms[1] if norms[1:] else None)
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
        draw = lambda p: jax.random.uniform(jax.random.key(p.ndim), p.shape, jnp.float32, 0.3, 1.3).astype(dtype)
        layer = nnx.merge(graphdef, jax.tree.map(draw, params), rest)
        xs, r = 3 + 2 * jax.random.normal(jax.random.key(1), (2, T, B, H, N), dtype)

        def separate(layer, xs, r):
            norm = lambda norm, xs: norm(xs) if isinstance(norm, nn.BatchNorm) else nn.Folded(norm)(xs)
            return layer.neuron(norm(layer.norm, xs) + (norm(layer.shortcut_norm, r) if norms[1:] else r - 3))

        @nnx.jit(static_argnames="call")
        def run(layer, call):
            graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
            outs, vjp = jax.vjp(
                lambda params, *x: call(nnx.merge(graphdef, params, rest, copy=True), *x), params, xs, r
            )
            return outs, vjp(cases.cotangents(outs))

        got = run(layer, lambda layer, xs, r: layer(xs, None, r if norms[1:] else r - 3))
        want = run(layer, separate)
        assert_fires(want[0][0], high=0.9)
        np.testing.assert_array_equal(got[0][0], want[0][0])
        assert_close(got, want, 1e-12 if double else 1e-5)


def test_what_a_row_normalisation_stores():
    """The normalised input in place of the input: one tensor, beside one number for each row and the checkpoints."""
    xs = jnp.ones((T, B, H, 64))
    layer = nn.NormSpiking(nn.IF(implementation="interpret"), nnx.LayerNorm(64, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)
    kept = jax.eval_shape(lambda xs: jax.vjp(lambda xs: nnx.merge(graphdef, state)(xs)[0], xs)[1], xs)
    assert [leaf.size for leaf in jax.tree.leaves(kept)].count(xs.size) == 1


def test_explain_says_what_does_not_run_in_the_kernel():
    layer = partial(nn.NormSpiking, nn.IF(implementation="interpret"))
    said = layer(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), shortcut_norm=nn.BatchNorm(4, rngs=nnx.Rngs(0))).explain(
        ones, ones
    )
    assert said.implementation == "interpret" and said.before == (
        "norm: LayerNorm writes the normalised input; its scale and bias are in the kernel",
        "shortcut_norm: BatchNorm reads statistics",
    )
    assert "before it, norm: TEBN writes the normalised input" in str(
        layer(nn.TEBN(3, 4, rngs=nnx.Rngs(0))).explain(ones)
    )


@pytest.mark.parametrize("per_step", [False, True])
def test_batch_norm_in_a_sequential_sees_time(per_step):
    xs = jax.random.normal(jax.random.key(0), (3, 4, 2, 5)) * jnp.arange(1.0, 4.0)[:, None, None, None]
    norm = nn.BatchNorm(5, per_step=per_step, rngs=nnx.Rngs(0))
    call = nnx.jit(lambda layer, xs: layer(xs))
    want = call(nnx.clone(norm), xs)
    np.testing.assert_array_equal(call(nn.Sequential(norm), xs)[0], want)
    dense = nn.Sequential(nn.BatchNorm(5, per_step=per_step, rngs=nnx.Rngs(0)), nn.IF(implementation="scan"))
    assert call(dense, xs[:, :, 0])[0].shape == (3, 4, 5)


def test_layers_without_packing_use_the_values_of_spikes():
    spikes = nn.Spikes.of((jax.random.uniform(jax.random.key(0), (3, 2, 4, 4, 5)) < 0.3).astype(jnp.float32))
    layers = [nn.IF(implementation="scan"), norm_spiking(norm=nn.BatchNorm(5, rngs=nnx.Rngs(0))), nn.spike_rate]
    for layer in [*layers, nn.mean_pool]:
        call = nnx.jit(lambda layer, x: layer(x)) if isinstance(layer, nnx.Module) else lambda layer, x: layer(x)
        got, want = (
            call(nnx.clone(layer) if isinstance(layer, nnx.Module) else layer, x) for x in (spikes, spikes.values)
        )
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert nn.Sequential(nn.PackSpikes(), nn.max_pool)(spikes.values)[0].shape == (3, 2, 2, 2, 5)


def test_max_pool_shows_a_nan():
    x = jnp.zeros((1, 6, 6, 1)).at[0, 2, 3, 0].set(jnp.nan).at[0, 3, 3, 0].set(2.0)
    want = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (1, 1), (1, 1), (0, 0)])
    np.testing.assert_array_equal(nn.max_pool(x), want)
