"""Spikes as bits, and what `explain` says."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_fires
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import snnfuse as sf
from snnfuse import models, nn, papers
from snnfuse.core.compose import Connect
from snnfuse.models import resnet, transformer
from snnfuse.ops.packing import packed_for

ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("pallas", "triton", "mosaic")]
IMPLEMENTATIONS = ["scan", "interpret", *ON_GPU]


compiled_pack, compiled_unpack = (jax.jit(f, static_argnums=1) for f in (sf.pack, sf.unpack))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(T=st.integers(1, 70), shape=st.lists(st.integers(1, 5), min_size=0, max_size=3), steps=st.sampled_from([8, 32]))
def test_pack_and_unpack_are_inverse(T, shape, steps):
    bits = np.random.default_rng(T).random((T, *shape)) < 0.3
    words = compiled_pack(jnp.asarray(bits), steps)
    assert words.shape == (-(-T // steps), *shape) and words.dtype == f"uint{steps}"
    np.testing.assert_array_equal(compiled_unpack(words, T), bits)
    little = np.unpackbits(np.asarray(words)[..., None].view(np.uint8), axis=-1, bitorder="little")
    np.testing.assert_array_equal(np.moveaxis(little, -1, 1).reshape(-1, *shape)[:T], bits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("steps", [8, 32])
@pytest.mark.parametrize("T", [5, 16, 43])
def test_a_kernel_packs_what_it_would_have_stored(T, steps, implementation):
    neuron, params, state, xs, _ = cases.make("outputs", T=T, lanes=(3, 50))
    out_dtype = {"spike": sf.Packed(steps), "v": jnp.float32}
    packed, final = sf.unroll(neuron, params, state, xs, implementation=implementation, out_dtype=out_dtype)
    want, want_final = sf.unroll(neuron, params, state, xs, implementation="scan")
    assert_fires(want["spike"])
    np.testing.assert_array_equal(sf.unpack(packed["spike"], T), want["spike"])
    np.testing.assert_allclose(packed["v"], want["v"], rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), final, want_final)


@pytest.mark.parametrize("implementation", ["scan", "interpret"])
def test_a_packed_output_carries_no_gradient(implementation):
    neuron, params, state, xs, _ = cases.make("lif", T=16, lanes=(4,))

    def f(xs):
        words, final = sf.unroll(neuron, params, state, xs, implementation=implementation, out_dtype=sf.Packed())
        return final.v

    def g(xs):
        return sf.unroll(neuron, params, state, xs, implementation="scan")[1].v

    cotangent = jnp.arange(1.0, 5.0)
    got, want = jax.vjp(f, xs)[1](cotangent), jax.vjp(g, xs)[1](cotangent)
    assert np.abs(want[0]).max() > 0
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-7)


GRADED = {
    "ILIF": (papers.ILIF(levels=4), papers.ILIFParams()),
    "Ternary": (papers.TernaryLIF(), papers.TernaryLIFParams()),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", GRADED)
def test_graded_spikes_keep_their_levels(name, implementation):
    neuron, params = GRADED[name]
    if (name, implementation) == ("ILIF", "mosaic"):
        pytest.skip("Mosaic GPU has no floor")
    low, high = neuron.spike_range
    xs = 2.5 * jax.random.normal(jax.random.key(0), (21, 3, 50)) + low + 1
    packed = sf.Packed(8, low, high)
    words, final = sf.unroll(neuron, params, None, xs, implementation=implementation, out_dtype=packed)
    want, want_final = sf.unroll(neuron, params, None, xs, implementation="scan")
    assert {float(level) for level in np.unique(want)} == set(range(low, high + 1))
    np.testing.assert_array_equal(sf.unpack(words, 21, jnp.float32, lowest=low), want)
    np.testing.assert_array_equal(sf.unpack(sf.pack(want, packed), 21, jnp.int8, lowest=low), want)
    np.testing.assert_allclose(final.v, want_final.v, rtol=1e-5, atol=1e-5)
    assert [(w.dtype, w.shape) for w in words] == [(jnp.uint8, (3, 3, 50))] * (3 if name == "ILIF" else 2)
    with pytest.raises(ValueError, match=rf"out_dtype must be Packed\(32, {low}, {high}\) for the graded spikes"):
        sf.unroll(neuron, params, None, xs, out_dtype=sf.Packed(32))


@pytest.mark.parametrize("implementation", [None, *ON_GPU[:2]])
@pytest.mark.parametrize("name", GRADED)
def test_layers_after_graded_spikes_store_their_bits(name, implementation):
    """The gradients are those of the values, and what is stored are 3 or 2 bits a spike."""
    neuron, params = GRADED[name]
    low, high = neuron.spike_range
    rngs = nnx.Rngs(0)
    layer = nn.Spiking(neuron, params, implementation=implementation)
    spiking = nn.NormSpiking(layer, nnx.LayerNorm(8, rngs=rngs), pack=True)
    plain, dense = nn.NormSpiking(spiking.neuron, spiking.norm), nn.Linear(8, 5, precision="highest", rngs=rngs)
    xs = jax.random.normal(jax.random.key(0), (16, 3, 8))
    models = [nn.Sequential(*layers, dense) for layers in ([spiking], [plain, nn.PackSpikes(low, high)], [plain])]
    models.append(nn.Sequential(plain, nn.PackSpikes(low, high), nn.Remat(nn.Sequential(dense))))

    @nnx.jit
    def run(model):
        return nnx.value_and_grad(lambda model: (model(xs)[0] ** 2).sum())(model)

    *found, (want, want_grads), _ = results = [run(model) for model in models]
    for value, grads in (*found, results[3]):
        np.testing.assert_allclose(value, want, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    spikes = spiking(xs)[0]
    assert (
        spikes.lowest == low and sum(w.nbytes for w in spikes.bits) * 8 == spikes.values.size * packed_for(neuron).bits
    )
    kept = jax.eval_shape(
        lambda k: jax.vjp(lambda k: nn.linear.bilinear(jnp.matmul, spikes, k), k)[1], dense.kernel[...]
    )
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)) == len(spikes.bits) * 48 + 8 * 5 * 4


@pytest.mark.parametrize("make", [models.spiking_resnet, models.spikformer])
@pytest.mark.parametrize("name", GRADED)
def test_networks_take_graded_neurons(make, name, monkeypatch):
    """A ResNet and a transformer: the same loss and gradients with packed spikes as with values."""
    monkeypatch.setitem(resnet.DEPTHS, 18, (1, 0, 0, 0))

    def neuron(threshold=1.0, **options):
        kind, params = GRADED[name]
        return nn.Spiking(kind, params._replace(threshold=threshold), **options)

    def run(memory):
        options = dict(neuron=neuron, memory=memory, rngs=nnx.Rngs(0))
        if make is models.spikformer:
            model = make(3, 4, depth=1, width=16, heads=2, **options)
        else:
            model = make(18, 3, 4, stem="cifar", **options)
        xs = jax.random.normal(jax.random.key(0), (2, 2, 16, 16, 3))
        return nnx.jit(nnx.value_and_grad(lambda model: (model(xs)[0] ** 2).mean()))(model)

    (value, grads), (want, want_grads) = run("packed"), run("fast")
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


def test_token_attention_packs_products_of_graded_spikes():
    """Two spikes of 0..4 multiply to 0..16; the gradients are those of the values."""
    neuron = lambda threshold=1.0, **options: nn.Spiking(*GRADED["ILIF"], **options)
    xs = 4 * jax.random.normal(jax.random.key(0), (2, 2, 3, 8))

    def run(memory):
        normal = nnx.initializers.normal(1.0)
        build = transformer._Build(neuron, nn.PrecisionPolicy.FLOAT32, memory, None, nnx.Rngs(0), kernel_init=normal)
        encoder = build.encoder(8, 2, 1, 0.0, tokens_alone=True)
        return nnx.jit(nnx.grad(lambda encoder: (encoder(xs)[0] ** 2).mean()))(encoder)

    got, want = run("packed"), run("fast")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_more_levels_than_bits_hold_are_named():
    def make(levels, memory="packed"):
        neuron = lambda threshold=1.0, **options: nn.Spiking(papers.ILIF(levels), papers.ILIFParams(), **options)
        options = dict(depth=3, width=8, heads=1, neuron=neuron, memory=memory)
        return nnx.eval_shape(lambda: models.qkformer(3, 4, **options, rngs=nnx.Rngs(0)))

    with pytest.raises(
        ValueError, match="memory must be 'fast' for neurons with spikes from 0 to 16, .*0 to 15.*'packed'"
    ):
        make(16)
    with pytest.raises(ValueError, match="spikes of ILIF must have at most 256 levels to be packed; got 0 to 256"):
        make(256)
    make(15), make(16, "fast")


def test_graded_words_need_a_dtype_that_holds_them():
    words = sf.pack(jnp.array([[-1.0, 0.0, 1.0]]), sf.Packed(8, -1, 1))
    np.testing.assert_array_equal(sf.unpack(words, 1, lowest=-1), [[-1, 0, 1]])
    for dtype in (jnp.bool_, jnp.uint8):
        with pytest.raises(ValueError, match=r"dtype must hold whole numbers from -1 to 2; got (bool|uint8)"):
            sf.unpack(words, 1, dtype, lowest=-1)
    with pytest.raises(ValueError, match="lowest must be 0 unless words are a tuple"):
        sf.unpack(words[0], 1, jnp.int8, lowest=-1)


@pytest.mark.parametrize("connect", ["add", "and", "iand"])
@pytest.mark.parametrize("packed", [sf.Packed(8), sf.Packed(8, 0, 2), sf.Packed(8, 0, 4)], ids=str)
@pytest.mark.parametrize("name", ["binary", "ILIF"])
def test_a_sum_or_a_product_of_graded_spikes_is_not_packed(name, packed, connect):
    """A product of 0 and 1 is 0 or 1, and fits."""
    neuron, params = GRADED[name] if name == "ILIF" else (sf.LIF(), sf.LIFParams(0.5))
    ones = jnp.ones((2, 3, 4))
    layer = nn.NormSpiking(
        nn.Spiking(neuron, params, out_dtype=packed), nnx.RMSNorm(4, rngs=nnx.Rngs(0)), connect=connect
    )
    if name == "binary" and connect != "add":
        words = layer(ones, None, ones)[0]
        found = sf.unpack(words, 2, jnp.int32) if packed.graded else sf.unpack(words, 2)
        np.testing.assert_array_equal(found, np.full((2, 3, 4), connect == "and"))  # both steps fire
        return
    graded = "graded " if name == "ILIF" else ""
    with pytest.raises(
        ValueError, match=f"out_dtype must not be Packed for {graded}spikes that are joined .*{connect}"
    ):
        layer(ones, None, ones)


@pytest.mark.parametrize("implementation", ["scan", "interpret"])
@pytest.mark.parametrize("connect", ["and", "iand"])
@pytest.mark.parametrize(
    "packed", [sf.Packed(8), sf.Packed(8, 0, 2), sf.Packed(8, -1, 4), sf.Packed(32, 0, 2)], ids=str
)
def test_a_packed_product_of_binary_spikes_has_their_exact_values(packed, connect, implementation):
    xs, shortcut = (jax.random.bernoulli(jax.random.key(k), 0.5, (10, 3, 4)).astype(jnp.float32) for k in (0, 1))
    run = lambda **options: sf.unroll(
        Connect(sf.LIF(), connect), sf.LIFParams(0.0), None, (xs, shortcut), implementation=implementation, **options
    )[0]
    want = xs * shortcut if connect == "and" else (1 - xs) * shortcut
    assert_fires(want)
    np.testing.assert_array_equal(run(), want)
    words = run(out_dtype=packed)
    np.testing.assert_array_equal(sf.unpack(words, 10, jnp.int32, lowest=packed.lowest), want)
    if packed == sf.Packed(8, 0, 2):  # nothing is 2
        np.testing.assert_array_equal(words[0], sf.pack(want))
        assert not words[1].any()


def test_bad_words():
    with pytest.raises(ValueError, match="steps must be 8 or 32; got 16"):
        sf.Packed(16)
    with pytest.raises(ValueError, match="lowest and highest must be whole numbers, .*; got 0 and 0"):
        sf.Packed(8, 0, 0)
    with pytest.raises(ValueError, match="T must be in 9..16"):
        sf.unpack(jnp.zeros((2, 3), jnp.uint8), 17)


def test_explain_on_a_cpu_says_scan_and_why_nothing_else():
    neuron, params, state, xs, _ = cases.make("lif")
    said = sf.explain(neuron, params, state, xs)
    assert said.implementation == "scan" and said.blocks is None and said.milliseconds is None
    assert "needs a GPU" in said.why_not["pallas"] and "needs a GPU" in said.why_not["mosaic"]
    assert "'interpret' could" in str(said)


@pytest.mark.parametrize("dtype, unit", [(jnp.float32, 4), (jnp.bfloat16, 2)])
def test_explain_counts_bytes(dtype, unit):
    T, M = 32, 1000
    xs = jax.ShapeDtypeStruct((T, M), dtype)
    said = sf.explain(sf.LIF(), sf.LIFParams(), None, xs, implementation="interpret", bandwidth=1e12)
    checkpoints = 32 // said.blocks.chunk - 1
    assert said.kept_bytes == 4 * M * checkpoints
    assert said.forward_bytes == M * (2 * T * unit + 4 + 4 * checkpoints)  # x, s; the final state; checkpoints
    assert said.backward_bytes == M * (3 * T * unit + 4 * checkpoints)  # x, ds, dx; checkpoints
    assert said.milliseconds == pytest.approx((said.forward_bytes + said.backward_bytes) / 1e9)
    packed = sf.explain(sf.LIF(), sf.LIFParams(), None, xs, implementation="interpret", out_dtype=sf.Packed())
    assert packed.forward_bytes < said.forward_bytes - M * T * (unit - 1)


def test_explain_shows_the_source_with_the_names_of_the_neuron():
    neuron, *args, _ = cases.make("adaptive")
    said = sf.explain(neuron, *args, implementation="scan", source=True)
    assert "def snn_forward" in said.source and "def snn_backward" in said.source and "decay_adapt" in said.source
    assert said.source in str(said)
    assert sf.explain(neuron, *args, implementation="scan").source is None


def test_explain_raises_what_unroll_raises():
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        sf.explain(sf.LIF(), sf.LIFParams(), None, jnp.ones((3, 4)), implementation="pallas")
    with pytest.raises(TypeError, match="xs"):
        sf.explain(sf.LIF(), sf.LIFParams(), None, jnp.ones((3, 4), jnp.int32))
