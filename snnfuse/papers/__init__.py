"""Neurons of recent papers. Each gets its fused kernels like any neuron.

    layer = nn.Spiking(papers.SEAdLIF(), papers.SEAdLIFParams(decay=0.95), learn=("a", "b"), shape=(256,))
    outs, state = layer(xs)                                                            # or sf.unroll(neuron, params, ...)

The words are those of `snnfuse.core.neurons`: x is the input current, v the membrane potential, u the potential before
the reset, s the spike, and every state starts at 0. `params` broadcast against [*B, N]; the choices are fields.
"""

from snnfuse.papers.adaptive import AdLIF, AdLIFParams, AdLIFState, SEAdLIF, SEAdLIFParams, SEAdLIFState
from snnfuse.papers.levels import (
    ILIF,
    QCFS,
    BinaryILIF,
    ILIFParams,
    ILIFState,
    QCFSParams,
    TernaryLIF,
    TernaryLIFParams,
    TernaryLIFState,
)
from snnfuse.papers.membranes import (
    CLIF,
    GLIF,
    KLIF,
    TCLIF,
    CLIFParams,
    CLIFState,
    GLIFParams,
    GLIFState,
    KLIFParams,
    KLIFState,
    QuadraticIF,
    QuadraticIFParams,
    QuadraticIFState,
    TCLIFParams,
    TCLIFState,
)
from snnfuse.papers.resonators import BRF, RF, BRFParams, BRFState, RFParams, RFState
