"""Truncated backpropagation: k1 = length, k2 = reach, the state carried across calls, and consecutive pieces of recordings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close
from flax import nnx

from snnfuse import nn, online
from snnfuse.data import loader

T, B, N = 12, 3, 4


def network():
    rngs = nnx.Rngs(0)
    options = dict(kernel_init=nnx.initializers.normal(1.0), rngs=rngs)
    lif = nn.LIF(decay=0.8, threshold=0.5)
    return nn.Sequential(
        nn.Linear(N, 5, **options), nn.Delay(5, 2, rngs=rngs), nn.Recurrent(lif, 5, rngs=rngs), nn.LI(decay=0.9)
    )


xs = jax.random.normal(jax.random.key(0), (T, B, N))
weigh = jax.random.normal(jax.random.key(1), (T, B, 5))
loss = lambda outs, weigh: (outs * weigh).sum()


def split_loss(model, first, last, back, state):
    """grad of the loss of steps first..last, from the state before step `back`, and the state after step last."""

    def f(model):
        outs, after = model(xs[back:last], state)
        return loss(outs[first - back :], weigh[first:last]), after

    grads, after = nnx.grad(f, has_aux=True)(model)
    return nnx.state(grads), after


@pytest.mark.parametrize("k1, k2", [(T, T), (4, 4), (3, 6), (2, 6), (2, 10)])
def test_the_gradient_is_that_of_a_direct_loop(k1, k2):
    """k1 = k2 = T is the whole gradient, k1 = k2 that of `nn.Pieces` with truncate, k2 > k1 a loop over windows."""
    model = network()
    _, got, _ = nnx.jit(lambda model: online.gradients(model, loss, xs, weigh, length=k1, reach=k2))(model)

    @nnx.jit
    def directly(model):
        if k1 == k2:
            run = model if k1 == T else nn.Pieces(model, k1, truncate=True)
            want = nnx.state(nnx.grad(lambda run: loss(run(xs)[0], weigh))(run))
            return want if k1 == T else want["layer"]
        want = None
        for last in range(k1, T + 1, k1):
            back = max(0, last - k2)
            state = None if back == 0 else model(xs[:back])[1]
            more, _ = split_loss(model, last - k1, last, back, state)
            want = more if want is None else jax.tree.map(jnp.add, want, more)
        return want

    assert_close(nnx.to_pure_dict(nnx.state(got)), nnx.to_pure_dict(directly(model)), 1e-5)


@pytest.mark.parametrize("k2", [2, 6])
def test_the_state_is_carried_across_calls_and_begins_starts_it_anew(k2):
    """Two calls give what one gives. A recording that begins in the middle is like one alone."""
    model = network()
    begins = jnp.zeros((T // 2, B), bool).at[3, 1].set(True)
    whole = online.gradients(model, loss, xs, weigh, length=2, reach=k2, begins=begins)
    value, grads, state = online.gradients(model, loss, xs[:8], weigh[:8], length=2, reach=k2, begins=begins[:4])
    more, others, state = online.gradients(
        model, loss, xs[8:], weigh[8:], state=state, length=2, reach=k2, begins=begins[4:]
    )
    assert_close((value + more, jax.tree.map(jnp.add, grads, others), state), whole, 1e-5)
    alone = [(0, slice(None)), (1, slice(0, 6)), (1, slice(6, None)), (2, slice(None))]
    parts = [online.gradients(model, loss, xs[t, b : b + 1], weigh[t, b : b + 1], length=2, reach=k2) for b, t in alone]
    assert_close(jax.tree.map(lambda *x: sum(x), *(p[1] for p in parts)), whole[1], 1e-5)


def test_aux_of_each_piece():
    found = online.gradients(network(), lambda outs: (outs.sum(), outs.mean((1, 2))), xs, length=4, has_aux=True)
    (value, aux), *_ = found
    assert aux.shape == (3, 4)
    np.testing.assert_allclose(value, aux.sum() * B * 5, rtol=1e-5)


def test_pieces_of_recordings_go_on_where_the_last_ended():
    source = [
        {"x": np.arange(10 * k, 10 * k + n, dtype=np.float32)[:, None], "label": k}
        for k, n in enumerate((5, 2, 4, 3, 1, 3))
    ]
    batches = list(loader.pieces(source, lambda s, rng: s, batch=2, length=3, along=("x",), shuffle=False))
    rows = [
        [(b["x"][: b["length"][i], i, 0].tolist(), int(b["label"][i]), bool(b["begins"][i])) for b in batches]
        for i in (0, 1)
    ]
    assert rows == [
        [([0, 1, 2], 0, True), ([3, 4], 0, False), ([30, 31, 32], 3, True), ([40], 4, True)],
        [([10, 11], 1, True), ([20, 21, 22], 2, True), ([23], 2, False), ([50, 51, 52], 5, True)],
    ]
    assert batches[1]["x"].shape == (3, 2, 1) and batches[1]["x"][2, 0] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(length=2, reach=3), "reach must be a multiple of length, 2; got 3"),
        (dict(length=5, reach=10), "length must divide T = 12"),
        (dict(length=2, begins=jnp.zeros((3, B), bool)), r"begins must be bool .*\(6, 3\); got bool\(3, 3\)"),
        (dict(length=2, reach=4, state=()), "state must be what a call with reach=4 returned"),
        (dict(length=2, reach=0.5), "reach must be a whole number"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        online.gradients(network(), loss, xs, weigh, **options)
