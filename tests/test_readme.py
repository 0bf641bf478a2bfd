"""The README says what the code does: its snippets run, and its tables are made from the committed rows."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

ROOT = pathlib.Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def ran():
    """The README's code, run from top to bottom in one namespace."""
    names = {"xs": jax.random.normal(jax.random.key(0), (6, 3, 256)) + 0.5, "linen": linen}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
    return names


def test_the_network_learns_a_batch(ran):
    spikes = jax.random.bernoulli(jax.random.key(0), 0.3, (3, 8, 28, 28, 1)).astype(jnp.float32)
    labels = jnp.arange(8)
    losses = [float(ran["train_step"](ran["model"], ran["optimizer"], spikes, labels)) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_neuron_fires_and_its_kernels_agree_with_scan(ran):
    outs = ran["outs"]
    assert 0.02 < outs.mean() < 0.4
    fused, _ = ran["sf"].unroll(ran["Bursting"](), ran["params"], None, ran["xs"], implementation="interpret")
    np.testing.assert_array_equal(outs, fused)


def test_the_linen_layer_is_the_same_op(ran):
    layer = ran["Layer"]()
    variables = layer.init(jax.random.key(0), ran["xs"])
    sf = ran["sf"]
    want, _ = sf.unroll(sf.LIF(), sf.LIFParams(jnp.full(256, 0.5)), None, ran["xs"])
    np.testing.assert_array_equal(layer.apply(variables, ran["xs"]), want)
    assert 0.02 < want.mean() < 0.4


@pytest.mark.parametrize("made_by", ["report.py", "figures.py"])
def test_tables_and_figure_are_those_of_the_rows(made_by):
    subprocess.run([sys.executable, ROOT / "benchmarks" / made_by, "--check"], check=True)
