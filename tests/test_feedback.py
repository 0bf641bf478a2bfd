"""`nn.Feedback`, a recurrent layer through a convolution or any layer, and layers whose neurons differ from each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cotangents
from compare import assert_close, assert_fires, assert_same_spikes
from flax import nnx

import snnfuse as sf
from snnfuse import nn
from snnfuse.nn import monitor
from snnfuse.ops.recurrent import RecurrentState

XS = jax.random.normal(jax.random.key(0), (7, 2, 4, 5, 3)) + 0.3  # [T, B, H, W, C]


def layer(conv=nnx.Conv, **options):
    made = nn.Feedback(nn.AdaptiveLIF(tau=2.0, tau_adapt=5.0), conv(3, 3, (3, 3), rngs=nnx.Rngs(0), **options))
    made.layer.kernel[...] = jnp.round(made.layer.kernel[...] * 512) / 256  # sums of spikes are exact in any order
    return made


def first():
    fed = (jax.random.uniform(jax.random.key(1), XS.shape[1:]) < 0.3).astype(jnp.float32)
    v, a = jax.random.uniform(jax.random.key(2), (2, *XS.shape[1:]), maxval=0.5)
    return RecurrentState(sf.AdaptiveLIFState(v, a), fed)


def loop(made, xs, state, *, late=0, flip=False):
    """The equation as a Python loop with `lax.conv_general_dilated`. `late` and `flip` plant bugs."""
    inner, fed, outs, history = state.neuron, state.fed, [], [state.fed] * late
    kernel = made.layer.kernel[...][::-1] if flip else made.layer.kernel[...]
    for x in xs:
        history.append(fed)
        back = jax.lax.conv_general_dilated(
            history[len(history) - 1 - late], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        inner, fed = made.neuron.neuron.step(made.neuron.params, inner, x + back + made.layer.bias[...])
        outs.append(fed)
    return jnp.stack(outs), RecurrentState(inner, fed)


def pull(run, made):
    """The outputs, and the gradients of xs, the first state, kernel and bias under random cotangents."""
    graph, weights = nnx.split(made)

    @jax.jit
    def both(*args):
        outs, vjp = jax.vjp(lambda xs, state, weights: run(nnx.merge(graph, weights), xs, state), *args)
        return outs, vjp(cotangents(outs))

    outs, (d_xs, d_state, d_weights) = both(XS, first(), weights)
    return outs, (d_xs, d_state, nnx.to_pure_dict(d_weights))


def test_spikes_and_every_gradient_are_those_of_the_loop():
    want, d_want = pull(loop, layer())
    got, d_got = pull(lambda made, xs, state: made(xs, state), layer())
    assert_fires(want[0])
    assert_same_spikes(got[0], want[0])
    assert_close(got, want, 1e-5)
    assert_close(d_got, d_want, 1e-4)
    assert {"kernel", "bias"} == d_got[2]["layer"].keys() and float(jnp.abs(d_got[2]["layer"]["kernel"]).min()) > 0


@pytest.mark.parametrize("bug", [{"late": 1}, {"flip": True}])
def test_a_planted_bug_is_seen(bug):
    wrong, _ = loop(layer(), XS, first(), **bug)
    with pytest.raises(AssertionError, match="spikes differ"):
        assert_same_spikes(layer()(XS, first())[0], wrong)


def test_pieces_equal_the_whole_and_the_first_state_is_silent():
    made = layer()
    whole, end = made(XS)
    start, middle = made(XS[:3])
    rest, last = made(XS[3:], middle)
    assert_same_spikes(jnp.concatenate([start, rest]), whole)
    assert_close(last, end, 1e-6)
    assert_same_spikes(made(XS, made.init_state(XS))[0], whole)
    assert not made.init_state(XS).fed.any()


def test_a_matrix_that_feeds_back_is_the_recurrent_layer():
    xs, rngs = XS.reshape(7, 2, 60), nnx.Rngs(0)
    recurrent = nn.Recurrent(nn.LIF(tau=2.0), 60, rngs=rngs)
    recurrent.weight[...] = jnp.round(recurrent.weight[...] * 512) / 512
    made = nn.Feedback(nn.LIF(tau=2.0), nnx.Linear(60, 60, use_bias=False, rngs=rngs))
    made.layer.kernel[...] = recurrent.weight[...]
    assert_fires(recurrent(xs)[0])
    assert_same_spikes(made(xs)[0], recurrent(xs)[0])


def test_it_trains_in_a_network_and_our_convolution_is_one_too():
    same = layer()(XS)[0]
    assert_same_spikes(layer(nn.Conv)(XS)[0], same)
    model = nn.Sequential(nnx.Conv(3, 3, (3, 3), rngs=nnx.Rngs(1)), layer(), nn.flatten, nn.LI(tau=2.0))
    value, gradients = nnx.jit(nnx.value_and_grad(lambda m: m(XS)[0].var()))(model)
    assert value > 0 and all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients))


def test_monitors_record_and_count_it():
    model = nn.Sequential(layer())
    (outs, _), spikes = monitor.record(model, XS)
    assert list(spikes) == ["layers.0"]
    assert_same_spikes(spikes["layers.0"], outs)
    states = monitor.record(model, XS, what="state")[1]["layers.0"]
    assert_close(states.v[-1], model(XS)[1][0].neuron.v, 1e-6)
    ones = nnx.Conv(3, 3, (3, 3), use_bias=False, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    fan_out = jax.grad(lambda x: ones(x).sum())(XS[0])  # fewer at the border of the map
    want = int((outs[:-1].sum(0) * fan_out).sum())
    assert monitor.operations(model, XS) == {"layers.0.layer": monitor.Operations(acs=want)}
    assert monitor.operations(layer(), XS) == {"layer": monitor.Operations(acs=want)}
    rngs = nnx.Rngs(0)
    two = nn.Feedback(nn.LIF(tau=2.0), nnx.Sequential(nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)))
    fed = two(XS)[0][:-1]
    counted = {
        "layer.layers.0": monitor.Operations(acs=5 * int(fed.sum())),
        "layer.layers.1": monitor.Operations(macs=5 * XS.size),  # its input is no spikes
    }
    assert fed.any() and monitor.operations(two, XS) == counted


@pytest.mark.parametrize(
    "error, match, make",
    [
        (TypeError, "neuron must be a module", lambda r: nn.Feedback(sf.LIF(), nnx.Conv(3, 3, (3, 3), rngs=r))),
        (TypeError, "layer must be a module without time", lambda r: nn.Feedback(nn.IF(), nn.IF())),
        (TypeError, "layer must be a module without time", lambda r: nn.Feedback(nn.IF(), jnp.tanh)),
        (
            ValueError,
            "layer must hold parameters only; got a BatchStat",
            lambda r: nn.Feedback(nn.IF(), nnx.BatchNorm(3, rngs=r)),
        ),
        (
            NotImplementedError,
            "implementation must be None or 'scan'.*got 'triton'",
            lambda r: nn.Feedback(nn.IF(implementation="triton"), nnx.Conv(3, 3, (3, 3), rngs=r)),
        ),
        (
            ValueError,
            r"must keep the shape \(2, 4, 5, 3\) of a step; it returns \(2, 4, 5, 8\)",
            lambda r: nn.Feedback(nn.IF(), nnx.Conv(3, 8, (3, 3), rngs=r))(XS),
        ),
    ],
)
def test_what_is_refused(error, match, make):
    with pytest.raises(error, match=match):
        make(nnx.Rngs(0))


def test_neurons_of_one_layer_may_differ():
    """The LSNN of Bellec et al.: some neurons adapt, others, whose beta is 0, are plain LIF neurons."""
    beta = jnp.where(jnp.arange(12) < 6, 0.0, 0.8)
    mixed = nn.Recurrent(nn.AdaptiveLIF(tau=2.0, tau_adapt=8.0, beta=beta), 12, heads=2, rngs=nnx.Rngs(0))
    xs = 0.5 + jax.random.normal(jax.random.key(3), (9, 3, 12))
    outs, _ = mixed(xs)
    for k, neuron in enumerate((nn.LIF(tau=2.0), nn.AdaptiveLIF(tau=2.0, tau_adapt=8.0, beta=0.8))):
        alone = nn.Recurrent(neuron, 6, rngs=nnx.Rngs(0))
        alone.weight[...] = mixed.weight[...][k]
        want, _ = alone(xs[..., 6 * k : 6 * k + 6])
        assert_fires(want, high=0.6)
        assert_same_spikes(outs[..., 6 * k : 6 * k + 6], want)
    np.testing.assert_array_equal(mixed.neuron.beta[...], beta)
