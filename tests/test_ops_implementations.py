"""The table of implementations: imported when asked for, reached in few calls, compiled once for equal eager calls."""

import subprocess
import sys
import traceback
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import snnfuse as sf
from snnfuse import nn
from snnfuse.ops import implementations

WITHOUT_THE_TRITON_LOWERING = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None  # an import of it raises ImportError
import jax, jax.numpy as jnp, numpy as np
import snnfuse as sf
import snnfuse.nn
from snnfuse.ops.implementations import _TABLE, get

imported = lambda: [module for module, _ in _TABLE.values() if module in sys.modules]
print(bool(_TABLE), imported())
get("scan")
print(imported())

xs = 2 * jax.random.normal(jax.random.key(0), (9, 2, 40))
args = sf.LIF(), sf.LIFParams(jnp.full(40, 0.7), 1.0), None, xs
outs = {}
for name in ("scan", "interpret"):
    outs[name], vjp = jax.vjp(lambda xs: sf.unroll(*args[:3], xs, implementation=name)[0], xs)
    outs["d_" + name] = vjp(jnp.cos(xs))[0]
assert outs["scan"].mean() > 0.02
np.testing.assert_array_equal(outs["scan"], outs["interpret"])
np.testing.assert_allclose(outs["d_scan"], outs["d_interpret"], rtol=1e-5, atol=1e-6)

device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
    said = sf.explain(*args)
print(said.implementation, "|", said.why_not["pallas"])
"""


@pytest.fixture(scope="module")
def said():
    """What a process without that lowering prints, line by line."""
    run = subprocess.run([sys.executable, "-c", WITHOUT_THE_TRITON_LOWERING], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_a_jax_without_the_triton_lowering_of_pallas_runs_the_others_and_explain_says_why(said):
    name, why = said[-1].split(" | ")
    assert name in ("mosaic", "triton", "scan")
    assert "has no Triton lowering of Pallas" in why


def test_importing_snnfuse_imports_no_kernels(said):
    assert said[:2] == ["True []", "['snnfuse.ops.scan']"]


@pytest.mark.parametrize("name", implementations.NAMES)
def test_every_implementation_has_the_methods_of_the_protocol(name):
    neuron, params, state, xs, _ = cases.make("lif")
    problem, *_ = sf.ops.check.check_call(neuron, params, state, xs, None)
    implementation = implementations.get(name)
    assert implementation.why_not(problem) is None or isinstance(implementation.why_not(problem), str)
    blocks = implementation.blocks(problem)
    assert (blocks is None) == (implementation.candidates(problem) == []) == (name == "scan")
    assert implementation.passes(problem, blocks).problem is problem


def test_an_array_passes_eleven_calls_from_the_module_to_the_kernel(monkeypatch):
    calls, library = [], Path(sf.__file__).parent

    def pallas_call(*args, **kwargs):
        stack = traceback.extract_stack()[:-1]
        calls.append([f.name for f in stack if library in Path(f.filename).parents])
        return real(*args, **kwargs)

    real = pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", pallas_call)
    layer = nn.LIF(tau=2.0, implementation="interpret")
    layer(jax.random.normal(jax.random.key(0), (3, 2, 17)))
    assert calls and all(ours[0] == "__call__" for ours in calls)
    assert max(map(len, calls)) <= 11, calls


@pytest.mark.parametrize("name", ["scan", "interpret"])
def test_equal_eager_calls_compile_once(name, caplog):
    layer = nn.LIF(tau=2.0, implementation=name)
    xs = np.random.default_rng(0).normal(size=(5, 2, 19)).astype(np.float32)
    layer(xs)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for i in range(3):
            layer(xs + i)
        assert [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()] == []
        layer(xs[1:])
        assert any("Compiling" in r.getMessage() for r in caplog.records), "the log does not show a compilation"


def test_the_order_of_none_is_that_of_the_rows():
    """benchmarks/results/choice.jsonl: scan for a step; triton for long sequences, sooner with constants, two states or many odd lanes."""

    def first(T, M, *, learned=False, states=1):
        neuron, params = (
            (sf.LIF(), sf.LIFParams(0.5)) if states == 1 else (sf.AdaptiveLIF(), sf.AdaptiveLIFParams(0.5, 0.9, 0.2))
        )
        params = params._replace(decay=jnp.float32(0.5)) if learned else params
        names = []
        check = lambda xs: names.extend(
            implementations.preference(sf.ops.check.check_call(neuron, params, None, xs, None)[0])
        )
        jax.eval_shape(check, jax.ShapeDtypeStruct((T, M), jnp.float32))
        return names[0]

    assert [first(T, 8) for T in (1, 2, 499, 500)] == ["scan", "pallas", "pallas", "triton"]
    many = 2**20 + 1
    assert [first(T, many) for T in (1, 31, 32)] == ["scan", "pallas", "triton"]
    assert [first(T, M) for T, M in ((32, many + 1), (32, 4097), (499, 9))] == [
        "pallas"
    ] * 3  # few lanes: triton starts late
    assert [first(T, many, learned=True) for T in (1, 32, 999, 1000)] == ["scan", "pallas", "pallas", "triton"]
    assert [first(T, 8, learned=True, states=2) for T in (1, 499, 500)] == ["scan", "pallas", "triton"]
