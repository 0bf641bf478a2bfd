"""Outputs and gradients of SpikingJelly and snnTorch for the tables of from_others.md, and of all exporters for the NIR cases.

    pip install torch==2.13.0 snntorch==1.0.0 spikingjelly==2.0.0 norse==1.1.0 sinabs==3.1.3 nir==1.0.8 nirtorch==2.6
    python tests/golden/make_ports.py          # writes ports.npz beside this file; on the CPU

A row is the code of the left column of the table, which is also the name of the case. ports.npz holds

    versions                     JSON
    x, g                         input and cotangent of all neurons [T, B, N]; u, g_u those of all surrogates
    images, g_images             input [T, B, H, W, C] and cotangent of all layers, channels last
    <row>/y, /d_x, /d_NAME       output, and gradients of sum(g y): of x and of every parameter, under its name in torch
    nir/<case>/g, d_x, d_NODE.F  the same for each case of nir/runs.npz: cotangent, gradients of x and of weights and biases

Lanes have different scales, so that some never spike, some stay above the threshold after a soft reset, and some see large
negative input; this is asserted. No spike changes when all inputs are scaled by 1 +- 1e-5.
"""

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import numpy as np
import snntorch as snn
import torch
from snntorch import surrogate as snntorch_surrogates
from spikingjelly.activation_based import layer, neuron, surrogate

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "nir"))
PAGE = HERE.parents[1] / "notebooks" / "docs" / "pages" / "how_to" / "from_others.md"
T, B, N = 20, 2, 24


def rows():
    """The left cells of the tables that name a neuron, a surrogate or a layer with arithmetic. make_psn.py has PSN."""
    cells = [c.replace("\\|", "|") for c in re.findall(r"^\| `(.*?)` \|", PAGE.read_text(), re.M)]
    return [c for c in cells if re.match(r"neuron\.(?!\w*PSN)|snn\.|surrogate\.|layer\.(Conv|Thres|BatchNorm)", c)]


def inputs():
    rng = np.random.default_rng(0)
    scale = np.linspace(0.2, 4, N)
    x = scale * rng.standard_normal((T, B, N)) + 0.25
    u = np.concatenate([[0.0], np.linspace(-3, 3, 101) + 0.013])
    images = rng.standard_normal((T // 5, B, 5, 6, 8))
    arrays = dict(x=x, g=rng.standard_normal(x.shape), u=u, g_u=rng.standard_normal(u.shape), images=images)
    return {k: v.astype(np.float32) for k, v in arrays.items()} | {
        "g_images": rng.standard_normal(images.shape).astype(np.float32)
    }


def run_neuron(code, x):
    """(the node, its output, its membrane) over time, a step at a time."""
    node = eval(code, {"neuron": neuron, "snn": snn})
    if code.startswith("neuron.NonSpiking"):
        y = torch.stack(node(x))
        return node, y, y
    state, ys, vs = [], [], []
    for x_t in x:
        if code.startswith("snn."):
            y, *state = node(x_t, *state)
            vs.append(state[-1])
        else:
            y = node(x_t)
            vs.append(node.v)
        ys.append(y)
    return node, torch.stack(ys), torch.stack(vs)


def run(code, arrays, scale=1.0):
    """{name: array} of one row."""
    if code.startswith("surrogate."):
        modules = {"surrogate": snntorch_surrogates if code[10].islower() else surrogate}
        x, g = torch.tensor(arrays["u"], requires_grad=True), arrays["g_u"]
        node, y = None, eval(code, modules)(x)
    elif code.startswith("layer."):
        x, g = (
            torch.tensor(arrays["images"][..., :3] if "Conv2d" in code else arrays["images"], requires_grad=True),
            arrays["g_images"],
        )
        torch.manual_seed(0)
        node = eval(code, {"layer": layer})
        for m in node.modules():
            if hasattr(m, "step_mode"):
                m.step_mode = "m"
        y = node(x.movedim(-1, 2)).movedim(2, -1)
    else:
        x, g = torch.tensor(scale * arrays["x"], requires_grad=True), arrays["g"]
        node, y, v = run_neuron(code, x)
    named = {} if node is None else dict(node.named_parameters())
    gradients = torch.autograd.grad(y, [x, *named.values()], torch.tensor(g), allow_unused=True)
    out = {"y": y.detach().numpy()}
    if "Conv2d" in code:
        out["weight"] = named["weight"].detach().numpy()
    if "BatchNorm" in code:
        out |= {name: p.detach().numpy() for name, p in named.items()}
    for name, d in zip(["x", *named], gradients, strict=True):
        out[f"d_{name}"] = d.numpy()
    if code.startswith(("neuron.", "snn.")):
        out["v"] = v.detach().numpy()
    return out


def nir_cases():
    import make_nir

    stored = np.load(HERE / "nir" / "runs.npz")
    rng = np.random.default_rng(1)
    for makers in (make_nir.snntorch_cases, make_nir.spikingjelly_cases, make_nir.norse_cases, make_nir.sinabs_cases):
        torch.manual_seed(0)
        for name, _, _, net, run, _, shape in makers():
            for parameter_name, parameter in net.named_parameters():
                if parameter_name.endswith("weight"):
                    parameter.data *= make_nir.WEIGHT
            torch.manual_seed(1)
            x = 0.5 + 2 * torch.randn(make_nir.T, make_nir.B, *shape)
            assert np.array_equal(x, stored[f"{name}/x"]), name
            x.requires_grad_()
            y = run(net, x)
            assert np.allclose(y.detach().numpy(), stored[f"{name}/y"], atol=1e-6), name
            g = rng.standard_normal(y.shape).astype(np.float32)
            named = {n: p for n, p in net.named_parameters() if p.requires_grad and n.endswith(("weight", "bias"))}
            gradients = torch.autograd.grad(y, [x, *named.values()], torch.tensor(g))
            yield f"nir/{name}/g", g
            for n, d in zip(["x", *named], gradients, strict=True):
                yield f"nir/{name}/d_{n}", d.numpy()


def main():
    torch.set_num_threads(1)
    arrays = inputs()
    results = {}
    for code in rows():
        out = run(code, arrays)
        v = out.pop("v", None)
        if v is not None and not set(np.unique(out["y"])) <= {0, 1}:
            v = None
        if v is not None:
            assert 0.02 < out["y"].mean() < 0.6, f"{code}: fires at {out['y'].mean():.3f}"
            assert (v < -2).any() and (out["y"].any((0, 1)) == 0).sum() < N / 2, code
            if "v_reset=None" in code or code.startswith("snn.") and "zero" not in code:
                assert (v[:-1] > 1.5).sum() > 5, f"{code}: no membrane stays above the threshold"
            for scale in (1 - 1e-5, 1 + 1e-5):
                assert np.array_equal(run(code, arrays, scale)["y"], out["y"]), f"{code}: a spike near the threshold"
            out["y"] = out["y"].astype(np.uint8)
        results |= {f"{code}/{name}": value for name, value in out.items()}
        print(code, {k: (v.shape, float(np.abs(v).max())) for k, v in out.items()})
    results |= nir_cases()
    packages = ("torch", "snntorch", "spikingjelly", "norse", "sinabs", "nir")
    versions = json.dumps({name: importlib.metadata.version(name) for name in packages})
    np.savez_compressed(HERE / "ports.npz", versions=versions, **arrays, **results)


if __name__ == "__main__":
    main()
