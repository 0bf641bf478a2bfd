"""Golden vectors for IF, LIF and parametric LIF from SpikingJelly's Torch reference, and for Leaky from snnTorch, on the CPU.

    pip install torch==2.13.0 spikingjelly==2.0.0 snntorch==1.0.0 numpy
    python tests/golden/make_spikingjelly.py          # 3 s; writes tests/golden/spikingjelly.npz

Every case runs T steps of N neurons in float32 from a random v0, and pulls random cotangents of the spikes and of the
last v back to x, v0 and the learned parameters. The archive holds

    versions              JSON: of torch, spikingjelly, snntorch and numpy
    cases                 JSON: a list of dicts, the choices of each case; "x" names its input array
    x/..., v0, g_s, g_v   what several cases share: inputs [T, N], initial state [N], cotangents [T, N] and [N]
    <id>/s, <id>/v        spikes [T, N] as uint8, last v [N]
    <id>/d_...            gradients: d_x, d_v0 and, where learned, d_w (), d_beta [N], d_threshold [N]

SpikingJelly's equations (spikingjelly/_ops/{if_,lif,plif}/reference.py; r is v_reset, or 0 where the reset is soft):

    IF    u[t] = v[t-1] + x[t]
    LIF   u[t] = v[t-1] + (x[t] - (v[t-1] - r)) / tau      decay_input
          u[t] = v[t-1] - (v[t-1] - r) / tau + x[t]        not decay_input;   parametric: 1 / tau = sigmoid(w)
    s[t] = u[t] >= 1;     v[t] = s[t] r + (1 - s[t]) u[t]  (hard)   or   u[t] - s[t]  (soft)

snnTorch's Leaky(beta, threshold) is LIF with decay = beta, r = 0 and no input decay, and fires at > (on continuous inputs
the same as >=). With reset_delay=True, its default, it keeps u and resets it at the start of the next step:

    zero       U[t] = beta (1 - R[t]) U[t-1] + x[t],     R[t] = U[t-1] > threshold, detached

so U[t] is our u[t], our v[t] is (1 - R[t+1]) U[t], and the hard reset is detached. "subtract" with the delay takes the
threshold off after the decay (our soft reset would have to take off threshold / beta): no case. With reset_delay=False the
state it returns is our v[t] and the reset is NOT detached, provided v[t] <= threshold after a soft reset: asserted.
"""

import argparse
import importlib.metadata
import itertools
import json
from pathlib import Path

import numpy as np
import snntorch
import torch
from snntorch import surrogate as snntorch_surrogates
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based import surrogate as spikingjelly_surrogates

T, N, SEED = 12, 32, 0
PATH = Path(__file__).parent / "spikingjelly.npz"
MARGIN = 1e-5  # no spike may change when the threshold moves by this, so that rounding cannot flip one

ATAN = ("ATan", {"alpha": 2.0})
SURROGATES = (
    ATAN,
    ("Sigmoid", {"alpha": 4.0}),
    ("PiecewiseQuadratic", {"alpha": 1.0}),
    ("SuperSpike", {"alpha": 1.0}),
    ("Erf", {"alpha": 2.0}),
    ("LeakyKReLU", {"leak": 0.1, "k": 1.0}),
)
HARD, HARD_LOW, SOFT = 0.0, -0.2, None  # v_reset
# x = mean + std * (one shared normal): a firing rate of 2 to 40 %, asserted in every case.
INPUTS = {
    "x/if": (0.2, 0.7),
    "x/tau2_in": (0.7, 1.4),
    "x/tau2": (0.35, 0.7),
    "x/tau5_in": (1.2, 2.5),
    "x/tau5": (0.25, 0.5),
    "x/leaky": (0.2, 0.45),
}
KINDS = {"if": "IFNode", "lif": "LIFNode", "plif": "ParametricLIFNode"}


def spikingjelly_case(kind, tau, v_reset, detach_reset, decay_input, surrogate):
    name, args = surrogate
    words = [kind if tau is None else f"{kind}_tau{tau:g}"]
    words += ["soft" if v_reset is None else f"hard{v_reset:g}", "detach" if detach_reset else "attach"]
    words += [] if decay_input is None else ["in" if decay_input else "out"]
    x = "x/if" if kind == "if" else f"x/tau{tau:g}{'_in' if decay_input else ''}"
    return {
        "id": "_".join([*words, name]), "library": "spikingjelly", "neuron": KINDS[kind], "tau": tau, "v_reset": v_reset,
        "detach_reset": detach_reset, "decay_input": decay_input, "surrogate": name, "surrogate_args": args, "x": x,
    }  # fmt: skip


def snntorch_case(mechanism, delay, surrogate):
    name, args = surrogate
    return {
        "id": f"leaky_{mechanism}_{'delay' if delay else 'now'}_{name}", "library": "snntorch", "neuron": "Leaky",
        "v_reset": HARD if mechanism == "zero" else SOFT, "detach_reset": delay, "decay_input": False,
        "reset_mechanism": mechanism, "reset_delay": delay, "surrogate": name, "surrogate_args": args, "x": "x/leaky",
    }  # fmt: skip


def cases():
    resets, flags = (HARD, HARD_LOW, SOFT), (False, True)
    for kind, tau in (("if", None), ("lif", 2.0), ("lif", 5.0), ("plif", 2.0)):
        decay_inputs = (None,) if kind == "if" else (True, False)
        for v_reset, detach, decay_input in itertools.product(resets, flags, decay_inputs):
            yield spikingjelly_case(kind, tau, v_reset, detach, decay_input, ATAN)
        if tau == 5.0:
            continue
        for v_reset, surrogate in itertools.product((HARD, SOFT), SURROGATES[1:]):
            yield spikingjelly_case(kind, tau, v_reset, False, decay_inputs[0], surrogate)
    for mechanism, delay in (("zero", True), ("zero", False), ("subtract", False)):
        for surrogate in (ATAN, ("fast_sigmoid", {"slope": 5.0})):
            yield snntorch_case(mechanism, delay, surrogate)


def run_spikingjelly(case, x, v0, g_s, g_v, *, threshold):
    choices = {
        "v_threshold": threshold,
        "v_reset": case["v_reset"],
        "detach_reset": case["detach_reset"],
        "surrogate_function": getattr(spikingjelly_surrogates, case["surrogate"])(**case["surrogate_args"]),
        "step_mode": "m",
    }
    if case["neuron"] == "IFNode":
        node = neuron.IFNode(**choices)
    elif case["neuron"] == "LIFNode":
        node = neuron.LIFNode(tau=case["tau"], decay_input=case["decay_input"], **choices)
    else:
        node = neuron.ParametricLIFNode(init_tau=case["tau"], decay_input=case["decay_input"], **choices)
    node.v = v0
    s = node(x)
    learned = dict(node.named_parameters())
    return pull_back(s, node.v, g_s, g_v, x=x, v0=v0, **learned)


def run_snntorch(case, x, v0, g_s, g_v, beta, *, threshold):
    node = snntorch.Leaky(
        beta=beta,
        threshold=torch.full_like(beta, threshold),
        learn_beta=True,
        learn_threshold=True,
        reset_mechanism=case["reset_mechanism"],
        reset_delay=case["reset_delay"],
        spike_grad=getattr(snntorch_surrogates, {"ATan": "atan"}.get(case["surrogate"], case["surrogate"]))(
            **case["surrogate_args"]
        ),
    )
    spikes, v = [], v0
    for x_t in x:
        if not case["reset_delay"]:
            assert not node.mem_reset(v).any(), f"{case['id']}: v above the threshold after the reset, not our equation"
        s_t, v = node(x_t, v)
        spikes.append(s_t)
    if case["reset_delay"]:
        v = (1 - node.mem_reset(v)) * v
    return pull_back(torch.stack(spikes), v, g_s, g_v, x=x, v0=v0, beta=node.beta, threshold=node.threshold)


def pull_back(s, v, g_s, g_v, **inputs):
    gradients = torch.autograd.grad((s, v), tuple(inputs.values()), (g_s, g_v))
    outs = {"s": s.detach().numpy().astype(np.uint8), "v": v.detach().numpy()}
    return outs | {f"d_{name}": d.numpy() for name, d in zip(inputs, gradients, strict=True)}


def make():
    """All arrays of the archive, by name."""
    for kind in KINDS:
        resolved = functional.neuron_implementation(kind, torch.device("cpu"))["implementation"]
        print(f"spikingjelly {kind}: {resolved}")
        if resolved != "torch-reference":
            raise RuntimeError(f"{kind}: want SpikingJelly's torch-reference, got {resolved}")
    torch.set_num_threads(1)

    rng = np.random.default_rng(SEED)
    normal = rng.standard_normal((T, N))
    shared = {name: mean + std * normal for name, (mean, std) in INPUTS.items()}
    shared["v0"] = rng.uniform(-0.5, 0.9, N)
    shared["g_s"] = rng.standard_normal((T, N))
    shared["g_v"] = rng.standard_normal(N)
    shared["beta"] = rng.uniform(0.3, 0.95, N)
    shared = {name: a.astype(np.float32) for name, a in shared.items()}

    table = list(cases())
    packages = ("torch", "spikingjelly", "snntorch", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    arrays = {"versions": np.array(json.dumps(versions)), "cases": np.array(json.dumps(table)), **shared}
    for case in table:
        run, names = run_spikingjelly, (case["x"], "v0", "g_s", "g_v")
        if case["library"] == "snntorch":
            run, names = run_snntorch, (*names, "beta")

        def result(threshold, run=run, names=names, case=case):
            args = [torch.from_numpy(shared[name].copy()) for name in names]
            args[0].requires_grad_()
            args[1].requires_grad_()
            return run(case, *args, threshold=threshold)

        outs = result(1.0)
        rate = outs["s"].mean()
        assert 0.02 < rate < 0.4, f"{case['id']}: firing rate {rate:.3f}"
        for moved in (1.0 - MARGIN, 1.0 + MARGIN):
            assert np.array_equal(result(moved)["s"], outs["s"]), (
                f"{case['id']}: a spike within {MARGIN} of the threshold"
            )
        for name, value in outs.items():
            assert np.isfinite(value).all(), f"{case['id']}/{name} is not finite"
            arrays[f"{case['id']}/{name}"] = value
    return arrays


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PATH)
    out = parser.parse_args().out
    arrays = make()
    np.savez_compressed(out, **arrays)
    rates = [a.mean() for name, a in arrays.items() if name.endswith("/s")]
    print(
        f"{out}: {len(rates)} cases, firing rates {min(rates):.3f} to {max(rates):.3f}, {out.stat().st_size / 1e3:.0f} kB"
    )


if __name__ == "__main__":
    main()
