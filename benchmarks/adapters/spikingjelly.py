"""SpikingJelly 2: `LIFNode`, and for 16-bit input `functional.lif_multi_step` with a float32 state.

`LIFNode` makes its state in the dtype of its input, and 16-bit states run a loop of Torch operations; the function, given a
float32 state, runs the fused kernels. Ways: "triton" (what the wheel runs), "native" (a build from source), "storage" (the
function with `neuron_storage` of the input's dtype: fewer bytes; it times several kernels at its first call), "cast" (the
input cast to float32). The readout is a LIF that never spikes, for its kernels return the membranes too.
"""

from importlib.metadata import version as version_of

import torch
from spikingjelly.activation_based import functional, neuron, surrogate

SIDE = "torch"
REFERENCE = "lif"
PROVIDERS = {"triton": "triton", "storage": "triton", "cast": "triton", "native": "cuda"}


def version():
    return version_of("spikingjelly")


def provide(way):
    """What setting SJ_LIF_CUDA_IMPLEMENTATION before the import does."""
    from spikingjelly._ops.lif import _selection

    _selection._requested = PROVIDERS[way]
    _selection._selections.clear()
    _selection._compiled_selections.clear()
    if torch.cuda.is_available():
        runs = functional.neuron_implementation("lif", torch.device("cuda", 0))["implementation"]
        if PROVIDERS[way] not in runs:
            raise RuntimeError(f"{way!r} would run {runs!r}")


def multi_step(xs, tau=2.0, threshold=1.0, **options):
    state = torch.zeros_like(xs[0], dtype=options.pop("state", torch.float32))  # in the layout of the input
    return functional.lif_multi_step(xs, state, tau, False, threshold, 0.0, surrogate.ATan(), False, **options)


def node():
    layer = neuron.LIFNode(tau=2.0, decay_input=False, v_reset=0.0, surrogate_function=surrogate.ATan(), step_mode="m")

    def run(xs):
        layer.reset()
        return layer(xs)

    return run


def lif(way, dtype):
    provide(way)
    if way == "storage":
        kind = getattr(torch, dtype)
        return lambda xs: multi_step(xs, state=kind, neuron_storage=kind)[0]
    if way == "cast":
        run = node()
        return lambda xs: run(xs.float())
    return node() if dtype == "float32" else lambda xs: multi_step(xs)[0]


def readout(way):
    provide(way)
    return lambda xs: multi_step(xs, tau=10.0, threshold=1e9, store_v_seq=True)[2]
