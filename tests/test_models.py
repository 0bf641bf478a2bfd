"""The networks: against a PyTorch build of the paper's, their memory settings, and what they say to bad input."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snnfuse import models, nn

sys.path.append(str(Path(__file__).parent / "golden"))
from spiking_resnet_inputs import inputs, probe, state_dict  # noqa: E402

GOLDEN = np.load(Path(__file__).parent / "golden" / "spiking_resnet.npz")
NEURONS, GRADIENTS = (json.loads(str(GOLDEN[name])) for name in ("neurons", "gradients"))


def resnet18(**options):
    model = models.spiking_resnet(18, 3, 10, **options, rngs=nnx.Rngs(0))
    models.load_torch(model, state_dict())
    return model


def spike_counts(model, xs):
    """[layer, T] in the order of the golden file."""
    counts = []

    def count(layer, xs, *args):
        outs, state = call(layer, xs, *args)
        counts.append(
            np.asarray(nn.spikes.values(outs), np.int64).sum(
                axis=tuple(range(1, outs.values.ndim if isinstance(outs, nn.Spikes) else outs.ndim))
            )
        )
        return outs, state

    call = nn.NormSpiking.__call__
    try:
        nn.NormSpiking.__call__ = count
        model(xs)
    finally:
        nn.NormSpiking.__call__ = call
    return np.stack(counts)


@pytest.mark.parametrize("memory", ["fast", "packed", "lean"])
def test_spiking_resnet18_is_that_of_pytorch(memory):
    """Logits, spikes layer by layer, every gradient, the running averages, and the logits in eval mode thereafter."""
    model = resnet18(memory=memory, implementation="scan")
    x, cotangent = inputs()
    xs = jnp.asarray(x, jnp.float32).transpose(0, 1, 3, 4, 2)
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params, rest, xs):
        def loss(params, xs):
            model = nnx.merge(graphdef, params, rest, copy=True)
            logits = nn.membrane_mean(model(xs)[0])
            return (logits * cotangent).sum(), (logits, nnx.state(model, nnx.BatchStat))

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, xs)

    (_, (logits, averages)), (grads, d_x) = run(params, rest, xs)
    np.testing.assert_allclose(logits, GOLDEN["logits64"], rtol=0, atol=3e-6 * abs(GOLDEN["logits64"]).max())
    by_name = dict(models.torch_variables(nnx.merge(graphdef, grads, rest)))
    for i, name in enumerate(GRADIENTS):
        g = np.asarray(d_x.transpose(0, 1, 4, 2, 3)) if name == "x" else models.to_torch(np.asarray(by_name[name][...]))
        norm = GOLDEN["norm64"][i]
        assert abs(np.linalg.norm(g.astype(np.float64)) - norm) < 3e-6 * norm, name
        assert abs(probe(name, g) - GOLDEN["probe64"][i]) < 1e-5 * norm, name
        head = GOLDEN[f"head/{name}"]
        np.testing.assert_allclose(g.ravel()[: head.size], head, rtol=0, atol=1e-5 * abs(g).max(), err_msg=name)
    nnx.update(model, averages)
    for name, variable in models.torch_variables(model):
        if "running" in name:
            want = GOLDEN[f"stats/{name}"]
            np.testing.assert_allclose(variable[...], want, rtol=0, atol=2e-6 * abs(want).max(), err_msg=name)
    model.eval()
    logits = nn.membrane_mean(jax.jit(lambda model, xs: model(xs)[0])(model, xs))
    np.testing.assert_allclose(logits, GOLDEN["eval_logits64"], rtol=0, atol=3e-6 * abs(logits).max())


def test_spikes_layer_by_layer_are_those_of_pytorch():
    model = resnet18(implementation="scan")
    x, _ = inputs()
    model.train()
    counts = spike_counts(model, jnp.asarray(x, jnp.float32).transpose(0, 1, 3, 4, 2))
    np.testing.assert_array_equal(counts, GOLDEN["spikes"])
