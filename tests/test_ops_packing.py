"""Spikes as bits, and what `explain` says."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_fires
from hypothesis import given, settings
from hypothesis import strategies as st

import snnfuse as sf

IMPLEMENTATIONS = ["scan", "interpret", *(pytest.param(i, marks=pytest.mark.gpu) for i in ("pallas", "mosaic"))]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(T=st.integers(1, 70), shape=st.lists(st.integers(1, 5), min_size=0, max_size=3), steps=st.sampled_from([8, 32]))
def test_pack_and_unpack_are_inverse(T, shape, steps):
    bits = np.random.default_rng(T).random((T, *shape)) < 0.3
    words = sf.pack(jnp.asarray(bits), steps)
    assert words.shape == (-(-T // steps), *shape) and words.dtype == f"uint{steps}"
    np.testing.assert_array_equal(sf.unpack(words, T), bits)
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


def test_bad_words():
    with pytest.raises(ValueError, match="steps must be 8 or 32; got 16"):
        sf.Packed(16)
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
