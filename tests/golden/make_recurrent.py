"""Golden vectors for recurrent layers from SpikingJelly and snnTorch, on the CPU.

    python tests/golden/make_recurrent.py        writes recurrent.npz beside this file

Needs torch, spikingjelly and snntorch, none of which snnfuse needs. Of each layer: the spikes, and the gradients of x and of
the recurrent weight under a random cotangent of the spikes.

    SpikingJelly   LinearRecurrentContainer(LIFNode(tau=2, decay_input=False)): its linear layer multiplies [x[t], s[t-1]] by
                   [I, R]; so the neuron sees x[t] + s[t-1] R^T. Hard reset, decay 1/2.
    snnTorch       RLeaky(beta=0.8) and RSynaptic(alpha=0.6, beta=0.8): `recurrent` is a linear layer; its bias is 0 here.
                   The reset is late, as in `snnfuse.interop.snntorch`.

torch's weight is [to, from], ours is [from, to]: the arrays here are ours.
"""

from pathlib import Path

import numpy as np
import snntorch
import torch
from snntorch import surrogate as snntorch_surrogate
from spikingjelly.activation_based import layer, neuron, surrogate

T, B, H = 20, 3, 12


def spikingjelly(weight):
    lif = neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0, surrogate_function=surrogate.ATan(2.0))
    container = layer.LinearRecurrentContainer(lif, H, H, bias=False, step_mode="s")
    with torch.no_grad():
        container.rc.weight.copy_(torch.cat([torch.eye(H), weight.T], 1))
    return container, lambda: container.rc.weight.grad[:, H:].T, lambda x: container(x)


def snn_torch(cell, weight):
    with torch.no_grad():
        cell.recurrent.weight.copy_(weight.T)
        cell.recurrent.bias.zero_()
    state = list(cell.reset_mem())

    def step(x):
        state[:] = cell(x, *state)
        return state[0]

    return cell, lambda: cell.recurrent.weight.grad.T, step


def run(name, weight, x, d_s):
    options = dict(linear_features=H, spike_grad=snntorch_surrogate.atan(alpha=2.0))
    _, gradient, step = {
        "spikingjelly": lambda: spikingjelly(weight),
        "rleaky": lambda: snn_torch(snntorch.RLeaky(beta=0.8, **options), weight),
        "rsynaptic": lambda: snn_torch(snntorch.RSynaptic(alpha=0.6, beta=0.8, **options), weight),
    }[name]()
    x = x.clone().requires_grad_()
    s = torch.stack([step(x[t]) for t in range(T)])
    s.backward(d_s)
    return {"s": s.detach(), "d_x": x.grad, "d_weight": gradient()}


def make():
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw)
    weight, x, d_s = 0.4 * normal(H, H), normal(T, B, H) * 0.7 + 0.2, normal(T, B, H)
    found = dict(weight=weight, x=x, d_s=d_s)
    for name in ("spikingjelly", "rleaky", "rsynaptic"):
        found |= {f"{name}_{key}": value for key, value in run(name, weight, x, d_s).items()}
    return {key: value.numpy() for key, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("recurrent.npz"), **make())
