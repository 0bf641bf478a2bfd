"""The recurrent op against a plain Python loop over `neuron.step`: spikes, every gradient, pieces, planted bugs, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NEURONS, cotangents, make
from compare import assert_close, assert_fires, assert_same_spikes
from flax import nnx

import snnfuse as sf
from snnfuse import nn
from snnfuse.nn.recurrent import Recurrent
from snnfuse.ops.recurrent import RecurrentState, unroll_recurrent

LANES = (3, 12)


def case(name, heads=1):
    """A case, its weight in multiples of 2^-10 (sums of spikes are then exact in any order), and a state."""
    c = make(name, T=9, lanes=LANES)
    size = LANES[-1] // heads
    k = jax.random.randint(jax.random.key(1), (heads, size, size), -256, 257).astype(jnp.float32)
    fed = (jax.random.uniform(jax.random.key(2), LANES) < 0.2).astype(jnp.float32)
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
        ({"implementation": "triton"}, NotImplementedError, "no recurrent kernel"),
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


def test_the_module_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="features must be a positive multiple of heads"):
        Recurrent(nn.LIF(tau=2.0), 10, heads=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mask must have the shape of the weight"):
        Recurrent(nn.LIF(tau=2.0), 4, mask=jnp.ones((3, 3)), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="neuron must be a module"):
        Recurrent(sf.LIF(), 4, rngs=nnx.Rngs(0))
