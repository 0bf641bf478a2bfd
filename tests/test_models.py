"""The networks: compared with a PyTorch build of the paper's network, in every memory setting; errors for bad input."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snnfuse import models, nn
from snnfuse.nn.monitor import record

sys.path.append(str(Path(__file__).parent / "golden"))
from spiking_resnet_inputs import inputs, probe, state_dict  # noqa: E402

GOLDEN = np.load(Path(__file__).parent / "golden" / "spiking_resnet.npz")
NEURONS, GRADIENTS = (json.loads(str(GOLDEN[name])) for name in ("neurons", "gradients"))


def zeros(**options):
    """The network with zeros as weights: to draw random ones takes seconds."""
    shapes = nnx.eval_shape(lambda: models.spiking_resnet(18, 3, 10, **options, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(shapes)
    return nnx.merge(graphdef, jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state))


def resnet18(**options):
    model = zeros(**options)
    models.load_torch(model, state_dict())
    return model


on_gpu = pytest.param("packed", "pallas", marks=pytest.mark.gpu)


@pytest.mark.parametrize("memory, implementation", [("packed", "scan"), ("lean", "scan"), on_gpu])
def test_spiking_resnet18_is_that_of_pytorch(memory, implementation):
    """Compare logits, every gradient, the running averages, and then the logits in eval mode."""
    model = resnet18(memory=memory, implementation=implementation)
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
    _, spikes = nnx.jit(record)(model, jnp.asarray(x, jnp.float32).transpose(0, 1, 3, 4, 2))
    blocks = [i for i, layer in enumerate(model.layers) if isinstance(layer, models.Residual)]
    paths = ["layers.0.layers.1.neuron"]
    paths += [f"layers.{i}.{place}.neuron" for i in blocks for place in ("main.layers.1", "join")]
    counts = [np.asarray(spikes[path], np.int64).reshape(len(x), -1).sum(1) for path in paths]
    assert len(NEURONS) == len(spikes)
    np.testing.assert_array_equal(counts, GOLDEN["spikes"])


def test_load_torch_says_what_is_wrong_and_changes_nothing():
    model = zeros()
    before = jax.tree.leaves(nnx.state(model))
    good = state_dict()
    for bad, message in (
        (
            {**good, "fc.weight": good["fc.weight"][:3]},
            r"state_dict\['fc.weight'\] must be \(10, 512\); got \(3, 512\)",
        ),
        ({k: v for k, v in good.items() if k != "bn1.bias"}, "missing or unknown: bn1.bias"),
        ({**good, "layer9.0.conv1.weight": good["fc.bias"]}, "missing or unknown: layer9.0.conv1.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            models.load_torch(model, bad)
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(depth=20), "depth must be one of 18, 19, 34, 50; got 20"),
        (dict(stem="tiny"), "stem must be one of imagenet, cifar; got 'tiny'"),
        (dict(memory="little"), "memory must be one of fast, packed, lean; got 'little'"),
        (dict(policy="int8"), "policy must be one of bfloat16, tf32, float32; got 'int8'"),
        (dict(connect="xor"), "must be one of .*add, and, iand; got 'xor'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        models.spiking_resnet(**(dict(depth=18, in_features=3, classes=10, rngs=nnx.Rngs(0)) | options))
