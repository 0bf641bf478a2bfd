"""The library against SpikingJelly and snnTorch: equal spikes, and the same last v and gradients up to rounding.

The golden vectors, and how their equations map to ours, are in golden/make_spikingjelly.py.
"""

import importlib.util
import json
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_close, assert_fires, assert_same_spikes

import snnfuse
from snnfuse.interop import snntorch

MAKE = Path(__file__).parent / "golden" / "make_spikingjelly.py"
GOLDEN = dict(np.load(MAKE.with_name("spikingjelly.npz")))
CASES = {case["id"]: case for case in json.loads(str(GOLDEN["cases"]))}
WITHOUT_TORCH = any(importlib.util.find_spec(name) is None for name in ("torch", "spikingjelly", "snntorch"))

SURROGATES = {
    "ATan": snnfuse.ATan,
    "Sigmoid": snnfuse.Sigmoid,
    "PiecewiseQuadratic": snnfuse.PiecewiseQuadratic,
    "SuperSpike": lambda alpha: {1.0: snnfuse.FastSigmoid(1.0)}[alpha],  # alpha / (1 + |u|)^2: the same at alpha 1 only
    "Erf": snnfuse.Gaussian,
    "LeakyKReLU": lambda leak, k: snnfuse.LeakyReLU(leak=leak, slope=k),
    "fast_sigmoid": lambda slope: snnfuse.FastSigmoid(alpha=slope),
}


def neuron_of(case):
    hard, detach = case["v_reset"] is not None, case["detach_reset"]
    reset = snnfuse.HardReset(v_reset=case["v_reset"], detach=detach) if hard else snnfuse.SoftReset(detach=detach)
    surrogate = SURROGATES[case["surrogate"]](**case["surrogate_args"])
    if case["neuron"] == "IFNode":
        return snnfuse.IF(reset=reset, surrogate=surrogate)
    v_rest = case["v_reset"] if hard else 0.0
    return snnfuse.LIF(reset=reset, decay_input=case["decay_input"], v_rest=v_rest, surrogate=surrogate)


def learned_of(case):
    """The parameters for which the case has a gradient, by their names in PyTorch."""
    if case["neuron"] == "ParametricLIFNode":
        return {"w": jnp.float32(-np.log(case["tau"] - 1))}
    if case["neuron"] == "Leaky":
        return {"beta": GOLDEN["beta"], "threshold": np.ones_like(GOLDEN["beta"])}
    return {}


def params_of(case, learned):
    if case["neuron"] == "IFNode":
        return snnfuse.IFParams(threshold=1.0)
    if case["neuron"] == "LIFNode":
        return snnfuse.LIFParams(decay=1 - 1 / case["tau"], threshold=1.0)
    if case["neuron"] == "ParametricLIFNode":
        return snnfuse.LIFParams(decay=1 - jax.nn.sigmoid(learned["w"]), threshold=1.0)
    return snnfuse.LIFParams(decay=learned["beta"], threshold=learned["threshold"])


def stack_params(*leaves):
    """[B, N], with one row for each case. A number that all cases share stays a constant."""
    if all(isinstance(leaf, float) for leaf in leaves) and len(set(leaves)) == 1:
        return leaves[0]
    return jnp.stack([jnp.broadcast_to(jnp.float32(leaf), GOLDEN["v0"].shape) for leaf in leaves])


def batches():
    """Cases with the same neuron run as one batch, with a row of parameters each, because compiling takes most of the time."""
    batches = defaultdict(list)
    for case in CASES.values():
        batches[neuron_of(case)].append(case)
    return [pytest.param(neuron, cases, id=cases[0]["id"]) for neuron, cases in batches.items()]


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("implementation", ("scan", "interpret"))
@pytest.mark.parametrize(("neuron", "cases"), batches())
def test_matches_pytorch(neuron, cases, implementation):
    State = snnfuse.IFState if isinstance(neuron, snnfuse.IF) else snnfuse.LIFState

    def forward(x, v0, learned):
        params = jax.tree.map(stack_params, *map(params_of, cases, learned))
        outs, final = snnfuse.unroll(neuron, params, State(v=v0), x, implementation=implementation)
        return outs, final.v

    @jax.jit
    def run(x, v0, learned, g_s, g_v):
        outs, vjp = jax.vjp(forward, x, v0, learned)
        return *outs, *vjp((g_s, g_v))

    rows = {key: np.stack([GOLDEN[key]] * len(cases), axis=-2) for key in ("v0", "g_s", "g_v")}
    x = np.stack([GOLDEN[case["x"]] for case in cases], axis=1)
    s, v, d_x, d_v0, d_learned = run(x, rows["v0"], [learned_of(case) for case in cases], rows["g_s"], rows["g_v"])

    for b, case in enumerate(cases):
        name = case["id"]
        want = {key: value for key, value in GOLDEN.items() if key.startswith(f"{name}/")}
        got = {"v": v[b], "d_x": d_x[:, b], "d_v0": d_v0[b]} | {f"d_{key}": d for key, d in d_learned[b].items()}
        want_s = want.pop(f"{name}/s")
        assert_fires(want_s)
        assert_same_spikes(s[:, b], want_s)
        assert_close({f"{name}/{key}": value for key, value in got.items()}, want, rtol=1e-5)


@pytest.mark.skipif(
    WITHOUT_TORCH,
    reason="torch, spikingjelly and snntorch are not installed: the committed golden vectors were made by "
    "tests/golden/make_spikingjelly.py",
)
def test_the_golden_vectors_can_be_made_again():
    spec = importlib.util.spec_from_file_location(MAKE.stem, MAKE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.make()
    assert json.loads(str(made.pop("cases"))) == list(CASES.values())
    print("committed with", GOLDEN["versions"], "made again with", made.pop("versions"))
    arrays = {key: value for key, value in GOLDEN.items() if key not in ("cases", "versions")}
    for key in arrays:
        if key.endswith("/s"):
            assert_same_spikes(made[key], arrays[key])
    assert_close(made, arrays, rtol=1e-6)


# ---- recurrent layers

RECURRENT = dict(np.load(MAKE.with_name("recurrent.npz")))
RECURRENT_LAYERS = {
    "spikingjelly": (snnfuse.LIF(), snnfuse.LIFParams(0.5, 1.0)),
    "rleaky": (snntorch.Leaky(), snnfuse.LIFParams(0.8, 1.0)),
    "rsynaptic": (snntorch.Synaptic(), snnfuse.CubaLIFParams(0.6, 0.8, 1.0)),
}


@pytest.mark.parametrize("name", RECURRENT_LAYERS)
def test_recurrent_layers_match_pytorch(name):
    """golden/make_recurrent.py says how their layers map to ours."""
    neuron, params = RECURRENT_LAYERS[name]
    run = lambda x, weight: snnfuse.unroll_recurrent(neuron, params, None, x, weight)[0]
    spikes, vjp = jax.vjp(run, RECURRENT["x"], RECURRENT["weight"])
    want = RECURRENT[f"{name}_s"]
    assert_fires(want, high=0.6)
    assert_same_spikes(spikes, want)
    gradients = tuple(RECURRENT[f"{name}_{key}"] for key in ("d_x", "d_weight"))
    assert_close(vjp(jnp.asarray(RECURRENT["d_s"])), gradients, 1e-5)
