"""Golden vectors of a training step of Spiking-ResNet-18, from PyTorch with SpikingJelly's LIFNode, on the CPU.

    pip install torch==2.13.0 spikingjelly==2.0.0 numpy
    python tests/golden/make_spiking_resnet.py        # 5 s on 2 cores; writes tests/golden/spiking_resnet.npz

The network of "Towards Scalable GPU-Accelerated SNN Training via Temporal Fusion" (https://arxiv.org/abs/2408.00280):
torchvision's ResNet-18, with a spiking neuron for every ReLU, ordinary layers over [T * B, ...], and logits averaged over T.

    u[t] = 0.2 v[t-1] + x[t];   s[t] = u[t] >= 0.3;   v[t] = u[t] (1 - s[t]);   ds/du = 1 where |u - 0.3| < 0.5, else 0

The reset is not detached, and v[-1] = 0. Weights and inputs are in spiking_resnet_inputs.py. The archive holds

    versions                JSON: of torch, spikingjelly and numpy
    neurons                 JSON: names of the spiking layers, in order
    spikes, eval_spikes     spike counts [layer, T], of the training forward and of the eval forward after it
    logits, eval_logits     [B, 10], and the same from a float64 network as logits64, eval_logits64
    stats/<name>            running_mean and running_var [C] after the training forward (momentum 0.1, unbiased variance)
    gradients               JSON: names of the parameters, then "x": gradients of sum(logits * cotangent)
    norm, probe             of every gradient in that order, its L2 norm and its random projection; also norm64, probe64
    head/<name>             the first 64 entries of a gradient, flattened as PyTorch has it
    margin                  how close a membrane of the float64 network comes to a threshold or an edge of the surrogate

The margin of every layer is 6 times or more what float32 rounds a membrane by there, and 2 threads and channels last give
the same spikes and windows of the surrogate: so should another framework's float32 (not TF32 or bfloat16).
A maximum over spikes has ties: the gradient of PyTorch's max pooling goes to the first in row-major order.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from spiking_resnet_inputs import WIDTHS, T, inputs, probe, state_dict
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

PATH = Path(__file__).parent / "spiking_resnet.npz"
THRESHOLD, DECAY = 0.3, 0.2
EDGES = (THRESHOLD, THRESHOLD - 0.5, THRESHOLD + 0.5)
MARGIN = 1e-5
HEAD = 64


class LIF(nn.Module):
    """[T * B, ...] to spikes of the same shape; keeps the membrane `u` [T, B, ...] before the reset, in float64."""

    def __init__(self):
        super().__init__()
        self.node = neuron.LIFNode(
            tau=1 / (1 - DECAY),
            decay_input=False,
            v_threshold=THRESHOLD,
            v_reset=0.0,
            surrogate_function=surrogate.Rect(alpha=1.0),
            detach_reset=False,
            step_mode="m",
        )

    def forward(self, x):
        xs = x.unflatten(0, (T, -1))
        s = self.node(xs)
        self.u = membrane(xs.detach().double(), s.detach())
        assert torch.equal(self.u >= THRESHOLD, s.bool()), "not our equation, or a membrane too close to the threshold"
        return s.flatten(0, 1)


def membrane(xs, s):
    v, us = torch.zeros_like(xs[0]), []
    for x_t, s_t in zip(xs, s, strict=True):
        us.append(DECAY * v + x_t)
        v = us[-1] * (1 - s_t)
    return torch.stack(us)


class BasicBlock(nn.Module):
    def __init__(self, n, m, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(n, m, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(m)
        self.sn1 = LIF()
        self.conv2 = nn.Conv2d(m, m, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(m)
        self.downsample = nn.Identity()
        if n != m:
            self.downsample = nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m))
        self.sn2 = LIF()

    def forward(self, x):
        out = self.bn2(self.conv2(self.sn1(self.bn1(self.conv1(x)))))
        return self.sn2(out + self.downsample(x))


class SpikingResNet(nn.Module):
    """[T, B, 3, H, W] to logits [B, classes], under torchvision's names."""

    def __init__(self, cin=3, classes=10, layers=(2, 2, 2, 2)):
        super().__init__()
        n = WIDTHS[0]
        self.conv1 = nn.Conv2d(cin, n, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(n)
        self.sn = LIF()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for i, (m, blocks) in enumerate(zip(WIDTHS, layers, strict=True), start=1):
            first = BasicBlock(n, m, stride=1 if i == 1 else 2)
            rest = [BasicBlock(m, m, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{i}", nn.Sequential(first, *rest))
            n = m
        self.fc = nn.Linear(n, classes)

    def forward(self, xs):
        x = self.maxpool(self.sn(self.bn1(self.conv1(xs.flatten(0, 1)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3))).unflatten(0, (T, -1)).mean(0)


def run(dtype, threads=1, memory_format=torch.contiguous_format):
    """One training step's forward and backward, then an eval forward: all results, by name."""
    torch.set_num_threads(threads)
    net = SpikingResNet().to(dtype)
    missing, unexpected = net.load_state_dict({k: torch.from_numpy(a) for k, a in state_dict().items()}, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    net.to(memory_format=memory_format)
    x, cotangent = (torch.from_numpy(a).to(dtype) for a in inputs())
    leaves = dict(net.named_parameters()) | {"x": x.requires_grad_()}
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, LIF)}

    logits = net(x)
    out = {"logits": logits, "u": {name: layer.u for name, layer in layers.items()}}
    out["gradients"] = dict(zip(leaves, torch.autograd.grad(logits, list(leaves.values()), cotangent), strict=True))
    out["stats"] = {name: a.clone() for name, a in net.named_buffers() if a.ndim}
    functional.reset_net(net)
    with torch.no_grad():
        out["eval_logits"] = net.eval()(x)
    out["eval_u"] = {name: layer.u for name, layer in layers.items()}
    return {
        name: {key: a.numpy() for key, a in value.items()} if isinstance(value, dict) else value.detach().numpy()
        for name, value in out.items()
    }


def margin(u, edges):
    return min(np.abs(u - edge).min() for edge in edges)


def check(name, golden, exact, others):
    """A layer's margin; fails if it is silent or saturated, or if a spike or a window of the surrogate could differ."""
    margins = []
    for key, edges in (("u", EDGES), ("eval_u", EDGES[:1])):
        u, want = golden[key][name], exact[key][name]
        rate, at = (u >= THRESHOLD).mean(), margin(want, edges)
        error = np.abs(u - want).max()
        near = max(np.abs(u - want)[np.abs(want - edge) < 0.02].max(initial=0) for edge in edges)
        print(
            f"{name:14} {key:6} rate {rate:.3f}, margin {at:.1e}, float32 error of u {error:.1e}, at an edge {near:.1e}"
        )
        assert 0.01 < rate < 0.6, f"{name}: firing rate {rate:.3f}"
        assert at > MARGIN, f"{name}: a membrane within {at:.1e} of an edge"
        for other in (exact, *others):
            for edge in edges:
                assert np.array_equal(other[key][name] >= edge, u >= edge), f"{name}: {key} differs at {edge}"
        margins.append(at)
    return min(margins)


def relative(got, want):
    """The largest error against the largest entry."""
    return np.abs(got - want).max() / np.abs(want).max()


def make():
    """All arrays of the archive, by name."""
    resolved = functional.neuron_implementation("lif", torch.device("cpu"))["implementation"]
    if resolved != "torch-reference":
        raise RuntimeError(f"want SpikingJelly's torch-reference, got {resolved}")
    golden, exact = run(torch.float32), run(torch.float64)
    others = run(torch.float32, threads=2), run(torch.float32, memory_format=torch.channels_last)

    neurons, gradients = list(golden["u"]), list(golden["gradients"])
    versions = {name: importlib.metadata.version(name) for name in ("torch", "spikingjelly", "numpy")}
    arrays = {name: np.array(json.dumps(value)) for name, value in (("versions", versions), ("neurons", neurons))}
    arrays["gradients"] = np.array(json.dumps(gradients))
    arrays["margin"] = np.array(min([check(name, golden, exact, others) for name in neurons]))
    for mode in ("", "eval_"):
        counts = [np.sum(u >= THRESHOLD, axis=(1, 2, 3, 4)) for u in golden[f"{mode}u"].values()]
        arrays[f"{mode}spikes"] = np.array(counts, np.int32)
        arrays[f"{mode}logits"], arrays[f"{mode}logits64"] = golden[f"{mode}logits"], exact[f"{mode}logits"]
        print(f"{mode}logits: {relative(arrays[f'{mode}logits'], arrays[f'{mode}logits64']):.1e}")
    for name, a in golden["stats"].items():
        arrays[f"stats/{name}"] = a
    print(f"stats: {max(relative(a, exact['stats'][name]) for name, a in golden['stats'].items()):.1e}")
    for suffix, result in (("", golden), ("64", exact)):
        found = result["gradients"].items()
        arrays[f"norm{suffix}"] = np.array([np.linalg.norm(g.astype(np.float64)) for _, g in found])
        arrays[f"probe{suffix}"] = np.array([probe(name, g) for name, g in found])
    for name, g in golden["gradients"].items():
        arrays[f"head/{name}"] = g.ravel()[:HEAD]

    for i, name in enumerate(gradients):
        want, scale = exact["gradients"][name], arrays["norm64"][i]
        errors = [relative(result["gradients"][name], want) for result in (golden, *others)]
        print(
            f"d {name:29} norm {scale:.3g}, off by {abs(arrays['norm'][i] / scale - 1):.1e}; "
            f"probe off by {abs(arrays['probe'][i] - arrays['probe64'][i]) / scale:.1e} of the norm; "
            f"entries by {errors[0]:.1e}, 2 threads {errors[1]:.1e}, channels last {errors[2]:.1e} of the largest"
        )
    return arrays


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PATH)
    out = parser.parse_args().out
    arrays = make()
    np.savez_compressed(out, **arrays)
    print(f"{out}: margin {arrays['margin']:.1e}, {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
