"""`nn.Stream`: a sequence in calls of any length gives what the whole gives, and the state can be kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_fires
from flax import nnx

from snnfuse import nn

XS = 2 * jax.random.normal(jax.random.key(0), (13, 3, 5)) + 0.5


def network():
    rngs = nnx.Rngs(0)
    hidden = [nn.Linear(5, 6, rngs=rngs), nn.BatchNorm(6, rngs=rngs), nn.LIF(tau=3.0), nn.Dropout(0.5, rngs=rngs)]
    return nn.Sequential(
        *hidden, nn.Recurrent(nn.LIF(tau=2.0), 6, rngs=rngs), nn.Linear(6, 4, rngs=rngs), nn.LI(tau=4.0)
    )


@pytest.fixture(scope="module")
def whole():
    """(the network after a training step, its outputs in evaluation mode)"""
    model = network()
    model(XS)  # moves the running statistics
    copy = nnx.clone(model)
    copy.eval()
    assert_fires(nn.Sequential(*copy.layers[:3])(XS)[0])
    return model, copy(XS)[0]


def test_calls_of_any_length_give_the_outputs_of_the_whole(whole):
    model, want = whole
    stream = nn.Stream(model, XS[0])
    got = [stream(XS[a:b]) for a, b in ((0, 1), (1, 2), (2, 7), (7, 8), (8, 13))]
    np.testing.assert_allclose(np.concatenate(got), want, rtol=1e-5, atol=1e-6)
    stream.reset()
    np.testing.assert_allclose(stream(XS[:5]), want[:5], rtol=1e-5, atol=1e-6)
    assert stream._run._cache_size() == 2  # K = 1 and K = 5
    assert not model.layers[1].use_running_average and not model.layers[3].deterministic


def test_a_stream_keeps_its_copy_and_reads_a_decision(whole):
    model, want = nnx.clone(whole[0]), whole[1]
    stream = nn.Stream(model, jax.ShapeDtypeStruct(XS.shape[1:], XS.dtype), read=lambda outs: outs[-1].argmax(-1))
    model.layers[0].kernel[...] *= 0
    np.testing.assert_array_equal([stream(x[None]) for x in XS], want.argmax(-1))


def test_the_state_is_saved_and_restored(whole, tmp_path):
    model, want = whole
    stream = nn.Stream(model, XS[0])
    stream(XS[:5])
    kept = stream.state
    stream.save(tmp_path / "state.npz")
    stream(XS[5:10])
    other = nn.Stream(model, np.asarray(XS[0]))
    other.restore(tmp_path / "state.npz")
    stream.state = kept
    for s in (stream, other):
        np.testing.assert_allclose(s(XS[5:10]), want[5:10], rtol=1e-5, atol=1e-6)
    narrow = nn.Stream(model, XS[0, :2])
    with pytest.raises(ValueError, match=r"path must hold the state of this network, arrays \[\(\(2, 6\), 'float32'\)"):
        narrow.restore(tmp_path / "state.npz")


@pytest.mark.parametrize("xs", [XS[0], XS[:, :2], XS[:0], XS.astype(jnp.bfloat16)])
def test_another_shape_or_dtype_is_refused(xs):
    with pytest.raises(ValueError, match=r"xs must be float32\[K, 3, 5\] with K >= 1; got"):
        nn.Stream(nn.LIF(tau=2.0), XS[0])(xs)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="layer must run along time"):
        nn.Stream(nn.mean_pool, XS[0])
    with pytest.raises(TypeError, match="read must be a function"):
        nn.Stream(nn.LIF(tau=2.0), XS[0], read="argmax")


def test_a_state_of_16_bits_is_saved_and_restored(tmp_path):
    """NumPy's format has no bfloat16: the file holds its bytes."""
    xs = XS.astype(jnp.bfloat16)
    stream, other = (nn.Stream(nn.Sequential(nn.Delay(5, 4, rngs=nnx.Rngs(0))), xs[0]) for _ in range(2))
    stream(xs[:6])
    stream.save(tmp_path / "state.npz")
    other.restore(tmp_path / "state.npz")
    np.testing.assert_array_equal(other(xs[6:]), stream(xs[6:]))


def test_a_list_in_place_of_an_array_is_refused():
    stream = nn.Stream(nn.Sequential(nn.Delay(5, 4, rngs=nnx.Rngs(0))), XS[0])
    with pytest.raises(TypeError, match=r"xs must be arrays \[K, B, ...\]; got a float in it"):
        stream([[0.5]])
