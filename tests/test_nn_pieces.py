"""`nn.Pieces`: the gradients of the whole sequence, from pieces that are recomputed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_close, assert_fires
from flax import nnx

import snnfuse as sf
from snnfuse import nn, training

T, B = 23, 3
XS = 2 * jax.random.normal(jax.random.key(1), (T, B, 5)) + 0.5
LABELS = jnp.arange(B)


def network(*extra, statistics="refuse", length=None):
    rngs = nnx.Rngs(0)
    layers = [nn.Linear(5, 6, rngs=rngs), nn.LIF(tau=3.0, learn="decay", shape=(6,)), *extra]
    layers += [nn.Recurrent(nn.LIF(tau=2.0), 6, rngs=rngs), nn.Linear(6, 3, rngs=rngs), nn.LI(tau=4.0)]
    model = nn.Sequential(*layers)
    return model if length is None else nn.Pieces(model, length, statistics=statistics)


@nnx.jit
def gradients(model, xs, state=None):
    def loss(model, xs):
        outs, after = model(xs, state)
        return training.temporal_cross_entropy(outs, LABELS), (outs, after)

    (_, (outs, after)), grads = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, xs)
    return outs, after, nnx.state(grads[0]), grads[1]


def same(ours, whole):
    """Outputs, state and gradients: `ours` of Pieces, whose parameters lie one level deeper."""
    outs, after, grads, of_xs = ours
    want, want_after, want_grads, want_of_xs = whole
    np.testing.assert_allclose(outs, want, rtol=1e-6, atol=1e-6)
    assert_close(jax.tree.leaves(after), jax.tree.leaves(want_after), 1e-5)
    assert_close(jax.tree.leaves(grads["layer"]), jax.tree.leaves(want_grads), 1e-5)
    assert_close(of_xs, want_of_xs, 1e-5)


@pytest.mark.parametrize("length", [5, 23, 100])
def test_outputs_states_and_gradients_are_those_of_the_whole(length):
    whole = gradients(network(), XS)
    assert_fires(network().layers[1](network().layers[0](XS))[0])
    same(gradients(network(length=length), XS), whole)


def test_truncation_gives_the_sum_of_the_gradients_of_the_pieces():
    model, cut = network(), nn.Pieces(network(), 5, truncate=True)

    @nnx.jit
    def sum_over_pieces(model):
        state, want = None, 0
        for start in range(0, T, 5):
            piece = XS[start : start + 5]
            loss = lambda model, piece=piece, state=state: (lambda outs: ((outs[0] ** 2).sum(), outs[1]))(
                model(piece, state)
            )
            grads, state = nnx.grad(loss, has_aux=True)(model)
            want = jax.tree.map(jnp.add, want, nnx.to_pure_dict(grads)) if want else nnx.to_pure_dict(grads)
        return want

    gradient = nnx.jit(lambda model: nnx.to_pure_dict(nnx.grad(lambda model: (model(XS)[0] ** 2).sum())(model)))
    got = gradient(cut)["layer"]
    assert_close(got, sum_over_pieces(model), 1e-5)
    whole = gradient(model)
    assert np.abs(got["layers"][0]["kernel"] - whole["layers"][0]["kernel"]).max() > 0.01


def test_a_state_goes_in_and_comes_out():
    model, pieces = network(), network(length=5)
    _, state = model(XS[:4])
    same(gradients(pieces, XS[4:], state), gradients(model, XS[4:], state))


def stored(layer, T):
    """Bytes that the backward pass finds stored, without the parameters and the input."""
    graphdef, params, others = nnx.split(layer, nnx.Param, ...)
    run = lambda params, xs: jax.vjp(lambda p: nnx.merge(graphdef, p, others)(xs)[0].sum(0), params)[1]
    kept = jax.eval_shape(run, params, jnp.zeros((T, B, 5)))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) - T * B * 5 * 4


def test_memory_grows_by_the_states_between_pieces_alone():
    states = B * 6 * 4 * 3 + B * 3 * 4  # two membranes and the fed-back spikes; the readout
    growth = stored(network(length=50), 2000) - stored(network(length=50), 1000)
    assert 0 < growth <= 20 * states * 1.2
    assert growth < (stored(network(), 2000) - stored(network(), 1000)) / 20


def test_the_length_of_a_piece_fits_the_budget():
    model, xs = network(), jax.ShapeDtypeStruct((1000, B, 5), jnp.float32)
    length = nn.piece_length(model, xs, 40_000)
    assert 10 < length < 1000
    assert nn.piece_length(model, xs, 80_000) == pytest.approx(2 * length, rel=0.2)
    assert nn.piece_length(model, xs, 10**9) == 1000
    with pytest.raises(ValueError, match="budget must be at least .* bytes, for a piece of one step; got 10"):
        nn.piece_length(model, xs, 10)


def test_batch_statistics_are_refused_frozen_or_taken_from_each_piece():
    make = lambda **options: network(nn.BatchNorm(6, rngs=nnx.Rngs(1)), **options)
    model = make(length=5)
    with pytest.raises(
        ValueError, match="layer.layers.2 takes the statistics of its batch|layers.2 takes the statistics"
    ):
        model(XS)
    model.eval(), (whole := make()).eval()
    same(gradients(model, XS), gradients(whole, XS))
    model, reference, state = make(length=5, statistics="piece"), make(), None
    model(XS)
    for start in range(0, T, 5):
        _, state = reference(XS[start : start + 5], state)
    np.testing.assert_allclose(model.layer.layers[2].mean[...], reference.layers[2].mean[...], rtol=1e-5)


def test_dropout_has_one_mask_for_all_pieces():
    model = nn.Pieces(nn.Sequential(nn.Dropout(0.5, rngs=nnx.Rngs(0)), nn.LI(decay=0.0)), 4)
    outs, _ = model(jnp.ones((11, 2, 50)))
    np.testing.assert_array_equal(outs, jnp.broadcast_to(outs[:1], outs.shape))
    assert 0.3 < float((outs[0] == 0).mean()) < 0.7
    again, _ = model(jnp.ones((11, 2, 50)))
    assert not np.array_equal(again[0], outs[0])


def test_it_trains_in_a_compiled_step():
    model = network(length=6)
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=nnx.Param)

    @training.compiled_step
    def step(model, optimizer, xs):
        loss, grads = nnx.value_and_grad(lambda m: training.temporal_cross_entropy(m(xs)[0], LABELS))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, XS)) for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: nn.Pieces(nn.mean_pool, 3), TypeError, "layer must run along time"),
        (
            lambda: nn.Pieces(nn.LIF(tau=2.0), 0),
            ValueError,
            "length must be a whole number of steps, at least 1; got 0",
        ),
        (lambda: nn.Pieces(nn.LIF(tau=2.0), 2.0), ValueError, "length must be a whole number of steps"),
        (lambda: nn.Pieces(nn.LIF(tau=2.0), 2, statistics="all"), ValueError, "statistics must be 'refuse' or 'piece'"),
        (lambda: nn.Pieces(nn.LIF(tau=2.0), 2)(jnp.zeros((0, 2, 3))), ValueError, r"at least 1; got lengths \[0\]"),
    ],
)
def test_bad_use_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_spikes_with_bits_go_in_and_come_out():
    spikes, _ = nn.Sequential(nn.LIF(tau=3.0), nn.PackSpikes())(XS)
    assert_fires(spikes.values)
    np.testing.assert_allclose(network(length=5)(spikes)[0], network()(spikes)[0], rtol=1e-6, atol=1e-6)
    again, _ = nn.Pieces(nn.Sequential(nn.LIF(tau=3.0), nn.PackSpikes()), 5)(XS)
    np.testing.assert_array_equal(again.bits, spikes.bits)


@pytest.mark.parametrize("length", [1, 5])
def test_packed_words_are_refused(length):
    with pytest.raises(ValueError, match=r"out_dtype of layer must not be Packed.*got Packed\(steps=8\)"):
        nn.Pieces(nn.LIF(tau=3.0, out_dtype=sf.Packed()), length)(XS)


def test_a_layer_that_returns_other_steps_is_refused():
    class Last(nn.Temporal):
        init_state = staticmethod(lambda xs: ())

        def __call__(self, xs, state=None):
            return xs[-1:], ()

    with pytest.raises(ValueError, match=r"layer must return arrays \[T, B, ...\], with T = 5 .* got \(1, 3, 5\)"):
        nn.Pieces(Last(), 5)(XS)


def test_a_monitor_sees_all_steps():
    whole, pieces = network(), network(length=5)
    want, got = (nn.monitor.record(model, XS)[1] for model in (whole, pieces))
    assert got.keys() == {f"layer.{path}" for path in want}
    for path, spikes in want.items():
        np.testing.assert_array_equal(got[f"layer.{path}"], spikes)
    assert list(nn.monitor.operations(pieces, XS).values()) == list(nn.monitor.operations(whole, XS).values())
    assert type(pieces) is nn.Pieces
