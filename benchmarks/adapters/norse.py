"""Norse: `LIFBoxCell`, a step at a time. It scales its input (fed twice as much), spikes at u > threshold, has no ATan: SuperSpike."""

from importlib.metadata import version as version_of

import torch

from adapters import not_needed

not_needed("h5py")

from norse.torch import (  # noqa: E402
    LIBoxCell,
    LIBoxParameters,
    LIBoxState,
    LIFBoxCell,
    LIFBoxFeedForwardState,
    LIFBoxParameters,
)

SIDE = "torch"
REFERENCE = "above, super"


def version():
    return version_of("norse")


def over_time(cell, state, xs):
    cell, outs = cell.to(xs.device), []
    for x in xs:
        out, state = cell(x, state)
        outs.append(out)
    return torch.stack(outs)


def lif(way, dtype):
    cell = LIFBoxCell(LIFBoxParameters(tau_mem_inv=torch.tensor(0.5), alpha=torch.tensor(1.0)), dt=1.0)
    return lambda xs: over_time(cell, LIFBoxFeedForwardState(v=torch.zeros_like(xs[0])), 2 * xs)


def readout(way):
    cell = LIBoxCell(LIBoxParameters(tau_mem_inv=torch.tensor(0.1)), dt=1.0)
    return lambda xs: over_time(cell, LIBoxState(v=torch.zeros_like(xs[0])), 10 * xs)
