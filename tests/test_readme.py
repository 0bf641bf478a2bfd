"""The README says what the code does: each snippet runs by itself, and the tables are made from the committed rows."""

import pathlib
import re
import subprocess
import sys
from functools import cache

import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@cache
def run(marker):
    """The names that the one snippet with `marker` in it defines. It starts from an empty namespace."""
    (snippet,) = (s for s in SNIPPETS if marker in s)
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    return names


def test_the_network_learns_a_batch():
    ran = run("train_step")
    labels = jnp.arange(64) % 10
    losses = [float(ran["train_step"](ran["model"], ran["optimizer"], ran["spikes"], labels)) for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_neuron_fires_and_its_kernels_agree_with_scan():
    ran = run("Bursting")
    assert 0.02 < ran["spikes"].mean() < 0.4
    fused, _ = ran["sf"].unroll(ran["Bursting"](), ran["params"], None, ran["xs"], implementation="interpret")
    np.testing.assert_array_equal(ran["spikes"], fused)


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(SNIPPETS) == 2 and len(TEXT.splitlines()) <= 150
    for link in re.findall(r"\]\((?!http)(.*?)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_tables_are_those_of_the_rows():
    """As a command. tests/test_benchmarks.py checks the figures."""
    subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", "--check"], check=True)
