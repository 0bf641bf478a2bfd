"""Checkpoints of nnx objects: exact, and refused by a network with other settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import snnfuse as sf
from snnfuse import nn, training

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning")  # Orbax has its own


def build(seed=0, width=5, dropout=0.5, **lif):
    rngs = nnx.Rngs(seed)
    lif = {"decay": 0.9, "reset": sf.SoftReset()} | lif
    return nn.Sequential(
        nnx.Linear(4, width, rngs=rngs), nn.LIF(**lif), nnx.Dropout(dropout, rngs=rngs), nnx.BatchNorm(width, rngs=rngs)
    )


def with_optimizer(model, transform=optax.adam(1e-3)):  # noqa: B008
    return model, nnx.Optimizer(model, transform, wrt=nnx.Param)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "step_1"
    model, optimizer = with_optimizer(build())
    model(jnp.ones((2, 3, 4)))  # moves the averages, and the stream of random numbers
    training.save(path, model, optimizer)
    return path, model, optimizer


def test_it_is_restored_exactly(saved):
    path, *objects = saved
    others = with_optimizer(build(1))
    others[0].eval()
    training.restore(path, *others)
    want, got = training.to_arrays(*objects), training.to_arrays(*others)
    assert want.keys() == got.keys() and len(want) > 10
    for name in want:
        np.testing.assert_array_equal(want[name], got[name], err_msg=name)
    assert jax.random.key_impl(others[0].layers[2].rngs.key[...]) == jax.random.key_impl(jax.random.key(0))


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(decay=0.5), r"0.layers.1.decay was 0.9 and is 0.5"),
        (dict(threshold=2.0), "0.layers.1.threshold was 1 and is 2"),
        (dict(reset=sf.HardReset()), "0.layers.1.neuron.reset was SoftReset and is HardReset"),
        (dict(surrogate=sf.ATan(3.0)), "surrogate.alpha was 2 and is 3"),
        (dict(dropout=0.25), "layers.2.rate was 0.5 and is 0.25"),
        (dict(width=6), "layers.0.out_features was 5 and is 6"),
    ],
)
def test_other_settings_are_named(saved, other, message):
    objects = with_optimizer(build(2, **other))
    before = training.to_arrays(*objects)
    with pytest.raises(ValueError, match=message):
        training.restore(saved[0], *objects)
    after = training.to_arrays(*objects)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_another_structure_is_named(saved, tmp_path):
    with pytest.raises(ValueError, match="layers.1 was LIF and is ParametricLIF"):
        plain = build()
        plain.layers[1] = nn.ParametricLIF(tau=2.0)
        training.restore(saved[0], *with_optimizer(plain))
    with pytest.raises(
        ValueError, match=r"variable 1.opt_state\S+ is \w+\[.*\] in the checkpoint .*, and missing in the objects"
    ):
        training.restore(saved[0], *with_optimizer(build(), optax.sgd(1e-3)))
    longer = build()
    longer.layers.append(nn.LI(tau=2.0))
    with pytest.raises(ValueError, match="0.layers._length was 4 and is 5"):
        training.restore(saved[0], *with_optimizer(longer))
    with pytest.raises(FileNotFoundError, match="no checkpoint .*nowhere"):
        training.restore(tmp_path / "nowhere", build())
    with pytest.raises(ValueError, match="already exists"):
        training.save(saved[0], build())


def test_how_a_layer_runs_may_differ(saved):
    training.restore(saved[0], *with_optimizer(build(implementation="scan")))


def test_settings_are_text_without_addresses():
    found = training.settings(build())
    assert found["layers.1.neuron.surrogate"] == "ATan" and found["layers.1.decay"] == "0.9"
    assert not any(" at 0x" in text for text in found.values())
    assert found == training.settings(build(1))


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="path must be a folder that training.save wrote"):
        training.restore(tmp_path, nn.LIF(tau=2.0, learn="decay"))
    for call in (training.save, training.restore):
        with pytest.raises(TypeError, match="objects: give at least one nnx object"):
            call(tmp_path / "new")
