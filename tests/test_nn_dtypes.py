"""Spikes may have any dtype: every layer, readout and helper takes each, or says that it does not; and no gradient is lost."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import snnfuse as sf
from snnfuse import nn
from snnfuse.nn import monitor

SPIKES = ("bool", "int8", "uint8", "bfloat16", "float16", "float32")
FLOATS = ("bfloat16", "float16", "float32")
rngs = nnx.Rngs(0)


def spikes(*shape):
    return jax.random.bernoulli(jax.random.key(0), 0.3, shape).astype(jnp.float32)


maps, rows = spikes(6, 2, 5, 5, 3), spikes(6, 2, 4)
# name: (function of the spikes, spikes in float32, the dtypes that it takes). Its value may not depend on the dtype.
TABLE = {
    "Linear": (nn.Linear(4, 3, rngs=rngs), rows, SPIKES),
    "Conv": (nn.Conv(3, 2, (3, 3), rngs=rngs), maps, SPIKES),
    "Conv of Spikes": (lambda x: nn.Conv(3, 2, (3, 3), rngs=nnx.Rngs(0))(nn.Spikes.of(x)), maps, SPIKES),
    "Folded": (nn.Folded(nnx.Conv(3, 2, (3, 3), rngs=rngs)), maps, SPIKES),
    "Sequential": (
        lambda x: nn.Sequential(nn.Linear(4, 3, rngs=nnx.Rngs(0)), nn.LIF(tau=2.0, threshold=0.1))(x)[0],
        rows,
        SPIKES,
    ),
    "max_pool": (nn.Folded(nn.max_pool), maps, SPIKES),
    "max_pool with windows 2": (nn.Folded(partial(nn.max_pool, window=2, padding=1)), maps - 1, ("int8", *FLOATS)),
    "mean_pool": (nn.mean_pool, maps, SPIKES),
    "flatten": (nn.flatten, maps, SPIKES),
    "PackSpikes": (lambda x: nn.PackSpikes()(x).bits, rows, SPIKES),
    "pack": (sf.pack, rows, SPIKES),
    "spike_rate": (nn.spike_rate, rows, SPIKES),
    "spike_rate of Spikes": (lambda x: nn.spike_rate(nn.Spikes.of(x)), rows, SPIKES),
    "membrane_mean": (nn.membrane_mean, rows, SPIKES),
    "membrane_max": (nn.membrane_max, rows, SPIKES),
    "membrane_last": (nn.membrane_last, rows, SPIKES),
    "firing_rates": (lambda x: monitor.firing_rates({"a": x})["a"], rows, SPIKES),
    "dead_neurons": (lambda x: monitor.dead_neurons({"a": x})["a"], rows * jnp.arange(4).clip(0, 1), SPIKES),
    "operations": (lambda x: jnp.asarray(monitor.operations(nn.Linear(4, 3, rngs=nnx.Rngs(0)), x)[""]), rows, SPIKES),
    "LIF": (lambda x: nn.LIF(tau=2.0)(x)[0], rows, FLOATS),
    "Recurrent": (lambda x: nn.Recurrent(nn.LIF(tau=2.0), 4, rngs=nnx.Rngs(0))(x)[0], rows, FLOATS),
    "BatchNorm": (lambda x: nn.BatchNorm(4, rngs=nnx.Rngs(0))(x) > 0, rows, FLOATS),
    "NormSpiking": (lambda x: nn.NormSpiking(nn.LIF(tau=2.0), nn.BatchNorm(4, rngs=nnx.Rngs(0)))(x)[0], rows, FLOATS),
}


@pytest.mark.parametrize("dtype", SPIKES)
@pytest.mark.parametrize("name", TABLE)
def test_every_function_takes_spikes_of_every_dtype(name, dtype):
    f, x, takes = TABLE[name]
    if dtype not in takes:
        if name.startswith("max_pool"):
            return  # -1 has no value there
        with pytest.raises(TypeError, match=f"must be float.*got {dtype}"):
            f(x.astype(dtype))
        return
    want, got = f(x), f(x.astype(dtype))
    assert np.any(want) and got.shape == want.shape
    rtol = 1e-2 if got.dtype in (jnp.bfloat16, jnp.float16) and not np.isin(want, (0, 1)).all() else 1e-6
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("out_dtype", [bool, "int8", jnp.uint8, sf.Packed(8)])
@pytest.mark.parametrize(
    "layer",
    [
        lambda lif: lif,
        lambda lif: nn.Recurrent(lif, 4, rngs=nnx.Rngs(0)),
        lambda lif: nn.NormSpiking(lif, nn.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))),
    ],
)
def test_a_gradient_that_would_be_zero_is_refused(layer, out_dtype):
    layer = layer(nn.LIF(tau=2.0, out_dtype=out_dtype))
    weight = jnp.eye(4)

    def through(weight):
        outs, _ = layer(rows @ weight)
        return jnp.sum(outs.astype(jnp.float32) * weight[0])

    through(weight)
    with pytest.raises(TypeError, match="out_dtype must be a float dtype where a gradient passes.*PackSpikes"):
        jax.grad(through)(weight)
    assert jnp.any(jax.grad(lambda w: through(jax.lax.stop_gradient(w)) + w.sum())(weight) != 0)


def test_words_are_not_taken_for_numbers():
    packed = nn.LIF(tau=2.0, threshold=0.1, out_dtype=sf.Packed(8))
    words, _ = packed(rows)
    with pytest.raises(ValueError, match=r"spikes in uint8 must be 0 or 1; got \d+. Unpack a Packed output"):
        nn.spike_rate(words)
    assert jnp.isnan(jax.jit(nn.spike_rate)(words)).any()
    np.testing.assert_array_equal(
        nn.spike_rate(sf.unpack(words, 6)), nn.spike_rate(nn.LIF(tau=2.0, threshold=0.1)(rows)[0])
    )
    for layer in (packed, nn.Remat(packed), nn.Pieces(packed, 8), nn.Sequential(nn.IF(), packed)):
        with pytest.raises(
            ValueError, match="out_dtype of layer 0 must not be Packed.*layer 1 would take its words.*nn.PackSpikes"
        ):
            nn.Sequential(layer, nn.Linear(4, 3, rngs=nnx.Rngs(0)))
    nn.Sequential(nn.Linear(4, 4, rngs=nnx.Rngs(0)), packed)


def test_only_spikes_are_packed():
    counts = 3 * rows
    with pytest.raises(ValueError, match="values must be 0 or 1 to be packed as bits; got 0.0 to 3.0"):
        nn.PackSpikes()(counts)
    jax.jit(nn.PackSpikes())(rows)
