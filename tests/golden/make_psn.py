"""Outputs and gradients of SpikingJelly's parallel spiking neurons, for tests/test_nn_psn.py.

    pip install torch==2.13.0 spikingjelly==2.0.0
    python tests/golden/make_psn.py            # writes psn.npz beside this file; on the CPU

psn.npz holds x and its cotangent g [T, B, N], and for each case <case>/weight, bias, y, d_x, d_weight, d_bias.
"""

from pathlib import Path

import numpy as np
import torch
from spikingjelly.activation_based import neuron

T, ORDER = 6, 3
CASES = {
    "PSN": lambda: neuron.PSN(T),
    "MaskedPSN": lambda: neuron.MaskedPSN(ORDER, T, lambda_init=1.0, step_mode="m"),
    "half masked": lambda: neuron.MaskedPSN(ORDER, T, lambda_init=0.5, step_mode="m"),
    "SlidingPSN": lambda: neuron.SlidingPSN(ORDER, step_mode="m"),
}


def main():
    rng = np.random.default_rng(0)
    x, g = (rng.standard_normal((T, 2, 24)).astype(np.float32) * s for s in (2, 1))
    out = {"x": x, "g": g}
    for name, make in CASES.items():
        torch.manual_seed(0)
        node = make()
        node.bias.data += torch.randn_like(node.bias) / 4
        xs = torch.tensor(x, requires_grad=True)
        y = node(xs)
        assert 0.05 < y.mean() < 0.6, f"{name} fires at {y.mean():.3f}"
        d = torch.autograd.grad(y, [xs, node.weight, node.bias], torch.tensor(g))
        arrays = dict(weight=node.weight, bias=node.bias, y=y, d_x=d[0], d_weight=d[1], d_bias=d[2])
        out |= {f"{name}/{key}": value.detach().numpy() for key, value in arrays.items()}
    np.savez_compressed(Path(__file__).with_suffix("").with_name("psn.npz"), **out)


if __name__ == "__main__":
    main()
