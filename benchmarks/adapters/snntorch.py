"""snnTorch: `Leaky`, a step at a time. It spikes at u > threshold and always keeps the spike out of the reset's gradient."""

import snntorch
import torch
from snntorch import surrogate

SIDE = "torch"
REFERENCE = "above, reset detached"


def version():
    return snntorch.__version__


def over_time(layer, xs, which):
    layer = layer.to(xs.device)
    membrane, outs = layer.reset_mem(), []
    for x in xs:
        spike, membrane = layer(x, membrane)
        outs.append((spike, membrane)[which])
    return torch.stack(outs)


def lif(way, dtype):
    layer = snntorch.Leaky(0.5, spike_grad=surrogate.atan(alpha=2.0), reset_mechanism="zero")
    return lambda xs: over_time(layer, xs, 0)


def readout(way):
    layer = snntorch.Leaky(0.9, reset_mechanism="none")
    return lambda xs: over_time(layer, xs, 1)
