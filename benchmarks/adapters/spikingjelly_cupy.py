"""SpikingJelly 0.0.0.0.14, the last release with CuPy kernels (`peers.py --cupy FOLDER` names where it is installed)."""

from importlib.metadata import version as version_of

import cupy  # noqa: F401  (its absence is what this row should say, not a silent use of Torch)
import numpy as np

np.int = int  # which it uses, and numpy 2 has not

import torch  # noqa: E402
from spikingjelly.activation_based import neuron, surrogate  # noqa: E402

SIDE = "torch"
REFERENCE = "lif"
NO_GRAPH = "CuPy launches on a stream of its own, which PyTorch does not capture: a graph would lack the kernels"

if not hasattr(neuron.LIFNode, "supported_backends"):
    raise ImportError(f"needs SpikingJelly 0.0.0.0.14; found {version_of('spikingjelly')}")


def version():
    return "0.0.0.0.14"


def lif(way, dtype):
    layer = neuron.LIFNode(
        tau=2.0, decay_input=False, v_reset=0.0, surrogate_function=surrogate.ATan(), step_mode="m", backend="cupy"
    ).to("cuda")
    kind = torch.float16 if dtype == "bfloat16" else torch.float32  # its 16-bit kernels are for float16

    def run(xs):
        layer.reset()
        return layer(xs.to(kind))

    return run
