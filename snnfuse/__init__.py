"""Spiking neural networks in JAX with temporal fusion: a layer's whole time loop, forward and backward, is one GPU kernel."""

from snnfuse.core.neuron import Neuron, WithState
from snnfuse.core.neurons import (
    IF,
    LI,
    LIF,
    AdaptiveLIF,
    AdaptiveLIFParams,
    AdaptiveLIFState,
    CubaLIF,
    CubaLIFParams,
    CubaLIFState,
    ExpIF,
    ExpIFParams,
    ExpIFState,
    IFParams,
    IFState,
    Izhikevich,
    IzhikevichParams,
    IzhikevichState,
    LIFParams,
    LIFState,
    LIParams,
    LIState,
)
from snnfuse.core.reset import HardReset, NoReset, SoftReset
from snnfuse.core.surrogate import (
    ATan,
    FastSigmoid,
    Gaussian,
    LeakyReLU,
    MultiGaussian,
    PiecewiseQuadratic,
    Rectangle,
    Relaxed,
    Sigmoid,
    Triangle,
    spike,
)
from snnfuse.ops.api import unroll
from snnfuse.ops.autotune import autotune
from snnfuse.ops.explain import Explanation, explain
from snnfuse.ops.packing import Packed, pack, unpack
from snnfuse.ops.recurrent import RecurrentState, unroll_recurrent

__version__ = "0.1.0"

__all__ = [name for name in dir() if not name.startswith("_") and name not in ("core", "ops")]
