"""Options of layers for sequences that were refused by an error that named nothing, or not refused at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snnfuse import nn, online, training
from snnfuse.nn import monitor

rngs = lambda: nnx.Rngs(0)
xs = jnp.ones((4, 2, 3))
drop_path = lambda drop: nn.NormSpiking(nn.IF(), nn.BatchNorm(3, rngs=rngs()), connect="add", drop_path=drop)
eprop = lambda decay_out: online.Eprop(nn.LIF(tau=2.0), 3, 5, decay_out=decay_out, rngs=rngs())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: nn.Delay(-1, 2, rngs=rngs()), "features must be a whole number, at least 1; got -1"),
        (lambda: nn.DelayedLinear(3, -2, 2, rngs=rngs()), "out_features must be a whole number, at least 1; got -2"),
        (lambda: nn.DelayedLinear(1.5, 2, 2, rngs=rngs()), "in_features must be a whole number, at least 1; got 1.5"),
        (lambda: online.Eprop(nn.IF(), 3, -1, rngs=rngs()), "features must be a whole number, at least 1; got -1"),
        (lambda: nn.Delay(3, 2, sigma="x", rngs=rngs()), "sigma must be above 0 and finite .*got 'x'"),
        (lambda: nn.sharpen(nn.Delay(3, 2, rngs=rngs()), "x"), "sigma must be above 0 and finite .*got 'x'"),
        (
            lambda: nn.Delay(3, 2, rngs=rngs())(xs, (1, 2)),
            r"state must be the input of the last 2 steps, .*; got a tuple",
        ),
        (lambda: nn.SlidingPSN(3)(xs, 1.0), r"state must be the input of the last 2 steps, .*; got a float"),
        (lambda: nn.TEBN(0, 3, rngs=rngs()), "T must be a whole number of steps, at least 1; got 0"),
        (lambda: drop_path(nn.Dropout(0.5, rngs=rngs())), r"drop_path must have no broadcast_dims, .*; got \(0,\)"),
        (
            lambda: online.gradients(eprop(0.5), lambda outs: outs.sum(), xs, length=2),
            "length and reach must be 1 for an Eprop with decay_out, .*; got 2 and 2",
        ),
        (
            lambda: nn.Stream(nn.Sequential(nn.PSN(4, rngs=rngs())), xs[0]),
            "layer must have no PSN, .*at layers.0. A Sliding",
        ),
        (lambda: nn.Stream(nn.Sequential(nn.TEBN(4, 3, rngs=rngs())), xs[0]), "layer must have no TEBN, .*at layers.0"),
        (
            lambda: monitor.record(nn.Sequential(nn.PSN(4, rngs=rngs())), xs, layers=["layers.0"], what="state"),
            "what must be 'spikes' or 'counts' for 'layers.0', a PSN; got 'state'",
        ),
    ],
)
def test_it_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_whole_number_of_numpy_is_one():
    assert nn.TEBN(np.int64(4), 3, rngs=rngs())(xs).shape == xs.shape


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.PSN(4, rngs=rngs()),
        lambda: nn.MaskedPSN(4, 2, rngs=rngs()),
        lambda: nn.SlidingPSN(2),
        lambda: eprop(0.0),
    ],
)
def test_monitors_see_layers_that_make_spikes_themselves(layer):
    model = nn.Sequential(layer(), nn.LI(tau=2.0))
    inputs = 2 * jax.random.normal(jax.random.key(0), xs.shape)
    spikes = nn.Sequential(model.layers[0])(inputs)[0]
    assert 0 < spikes.mean() < 1
    (_, found), (_, counts) = (monitor.record(model, inputs, what=what) for what in ("spikes", "counts"))
    assert found.keys() == counts.keys() == {"layers.0"}
    np.testing.assert_array_equal(found["layers.0"], spikes)
    np.testing.assert_array_equal(counts["layers.0"], spikes.sum(0))
    assert type(model.layers[0]) is type(layer())


def test_the_bounds_of_a_rate_penalty_may_be_traced():
    counts = {"a": jnp.ones((2, 3))}
    got = jax.jit(lambda upper: training.rate_penalty(counts, 4, upper=upper))(0.1)
    np.testing.assert_allclose(got, training.rate_penalty(counts, 4, upper=0.1))
