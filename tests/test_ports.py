"""Ports of SpikingJelly, snnTorch, Norse and sinabs give their outputs and all their gradients.

The table cells of from_others.md are run as they stand; the golden values are from golden/make_ports.py.
"""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_same_spikes
from flax import nnx

import snnfuse as sf
from snnfuse import nn
from snnfuse.interop import nir as interop
from snnfuse.interop import snntorch

ROOT = Path(__file__).parents[1]
GOLDEN = dict(np.load(ROOT / "tests" / "golden" / "ports.npz"))
RUNS = dict(np.load(ROOT / "tests" / "golden" / "nir" / "runs.npz"))
PAGE = (ROOT / "notebooks" / "docs" / "pages" / "how_to" / "from_others.md").read_text()
TABLE = dict(re.findall(r"^\| `(.*?)` \| `(.*?)`", PAGE, re.M))
STARTS = dict(re.findall(r"^\| `(.*?)` \| `.*?`; there v starts at (-?[\d.]+)", PAGE, re.M))
NAMES = {"sf": sf, "nn": nn, "nnx": nnx, "snntorch": snntorch}
THEIRS = {"decay": "beta"}
# the rows of parallel neurons, which have weights over time, are in test_nn_psn.py
ROWS = [row for row in TABLE if re.match(r"neuron\.(?!\w*PSN)|snn\.|surrogate\.|layer\.(Conv|Thres|BatchNorm)", row)]
RTOL = 2e-5


def golden(row):
    return {name.removeprefix(f"{row}/"): value for name, value in GOLDEN.items() if name.startswith(f"{row}/")}


@partial(jax.jit, static_argnums=0)
def pulled_back(f, params, xs, g):
    """f(params, xs), and the gradients of both."""
    y, vjp = jax.vjp(f, params, xs)
    return y, vjp(g)


def pull_back(layer, xs, g, *state):
    """(output, gradient of sum(g output) with regard to x, the same for the parameters, by path)."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def run(params, xs):
        outs = nnx.merge(graph, params, rest, copy=True)(xs, *state)
        return outs[0] if isinstance(outs, tuple) else outs

    y, (d_params, d_x) = pulled_back(run, params, jnp.asarray(xs), jnp.asarray(g))
    return y, d_x, {path[-1]: leaf[...] for path, leaf in nnx.to_flat_state(d_params)}


def test_the_golden_file_has_every_row():
    assert len(ROWS) > 30 and all(f"{row}/y" in GOLDEN for row in ROWS) and len(STARTS) == 2


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith(("neuron.", "snn."))])
def test_neurons(row):
    want = golden(row)
    layer, first = eval(TABLE[row], NAMES), STARTS.get(row)
    state = None if first is None else layer.neuron.init_state((2, 24))._replace(v=jnp.full((2, 24), float(first)))
    y, d_x, d_params = pull_back(layer, GOLDEN["x"], GOLDEN["g"], *[] if state is None else [state])
    if want["y"].dtype == np.uint8:
        assert_same_spikes(y, want.pop("y"))
    else:
        assert_close(np.asarray(y), want.pop("y"), RTOL)
    d_params = {f"d_{THEIRS.get(name, name)}": np.asarray(d) for name, d in d_params.items()}
    assert_close({"d_x": np.asarray(d_x), **d_params}, want, RTOL)


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("surrogate.")])
def test_surrogates(row):
    surrogate, want = eval(TABLE[row], NAMES), golden(row)
    u, above = GOLDEN["u"], row[10].islower()  # snnTorch: no spike at u = 0
    assert u[0] == 0
    y, vjp = jax.vjp(lambda u: sf.spike(u, surrogate), u)
    assert_same_spikes(y[above:], want["y"][above:])
    assert_close(np.asarray(vjp(GOLDEN["g_u"])[0]), want["d_x"], RTOL)


def test_a_convolution():
    (row,) = (row for row in ROWS if "Conv2d" in row)
    want, layer = golden(row), eval(TABLE[row], NAMES)
    layer.kernel[...] = np.moveaxis(want["weight"], (0, 1), (-1, -2))
    y, d_x, d_params = pull_back(layer, GOLDEN["images"][..., :3], GOLDEN["g_images"])
    got = dict(y=y, d_x=d_x, d_weight=np.moveaxis(np.asarray(d_params["kernel"]), (-1, -2), (0, 1)))
    assert_close(jax.tree.map(np.asarray, got), {name: want[name] for name in got}, RTOL)


@pytest.mark.parametrize("row", [row for row in ROWS if "BatchNorm" in row])
def test_normalisation(row):
    want = golden(row)
    y, d_x, d_params = pull_back(eval(TABLE[row], NAMES), GOLDEN["images"], GOLDEN["g_images"])
    got = dict(y=y, d_x=d_x, d_weight=d_params["scale"])
    if "Time" in row:  # theirs: one weight a step, no bias
        want["d_weight"] = sum(d for name, d in want.items() if name.startswith("d_bn_list"))
    else:
        got["d_bias"] = d_params["bias"]
    assert_close(jax.tree.map(np.asarray, got), {name: want[name] for name in got}, 1e-4)


# NIR: the gradients of the network that the file was written from.


@dataclasses.dataclass(frozen=True)
class SingleExponential:
    """sinabs' default surrogate; the width is half the threshold."""

    width: float

    def __call__(self, u):
        return jnp.exp(-jnp.abs(u) / self.width) / self.width


SURROGATES = {
    "snntorch": sf.ATan(2.0),
    "spikingjelly": sf.Sigmoid(4.0),
    "spikingjelly_cuba": sf.Rectangle(1.0),
    "norse": sf.FastSigmoid(1.0),  # Norse's SuperSpike does not use its alpha
    "sinabs": SingleExponential(0.25),
    "sinabs_iaf_conv": SingleExponential(0.5),
}
CASES = json.loads(str(RUNS["cases"]))


@pytest.mark.parametrize("case", CASES)
def test_nir_files(case):
    pytest.importorskip("nir")
    change = {k: tuple(v) if isinstance(v, list) else v for k, v in CASES[case]["change"].items()}
    dialect = dataclasses.replace(getattr(interop, CASES[case]["dialect"]), **change)
    surrogate = SURROGATES.get(case, SURROGATES.get(case.split("_")[0]))
    model = interop.from_nir(ROOT / "tests" / "golden" / "nir" / f"{case}.nir", dialect, surrogate=surrogate)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    want = golden(f"nir/{case}")
    run = lambda params, xs: nnx.merge(graph, params, rest)(xs)[0]
    _, (d_params, d_x) = pulled_back(run, params, last(RUNS[f"{case}/x"]), jnp.asarray(want.pop("g")))
    got, want["d_x"] = {"d_x": np.asarray(d_x)}, last(want["d_x"])
    modules = (getattr(layer, "layer", layer) for layer in nnx.merge(graph, d_params, rest).layers)
    ours = [module for module in modules if isinstance(module, nnx.Linear | nnx.Conv)]
    theirs = list(dict.fromkeys(name.rpartition(".")[0] for name in want if name != "d_x"))
    for module, name in zip(ours, theirs, strict=True):
        kernel = np.asarray(module.kernel[...])
        got[f"{name}.weight"] = np.moveaxis(kernel, (-1, -2), (0, 1))
        if f"{name}.bias" in want:  # an exporter writes a bias of zeros for a convolution that has none
            got[f"{name}.bias"] = np.asarray(module.bias[...])
    if case == "sinabs_iaf_conv":  # sinabs' SumPool2d gives no gradient to a window of zeros
        for name in ("d_x", "d_0.weight"):
            assert np.abs(got.pop(name) - want.pop(name)).max() > 0
    assert_close(got, want, RTOL)


def last(x):
    return np.moveaxis(x, 2, -1) if x.ndim > 3 else x
