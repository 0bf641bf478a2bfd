"""NIR, the Neuromorphic Intermediate Representation: `from_nir` makes a model of a graph, `to_nir` a graph of a model.

NIR's neurons are equations in continuous time, which every simulator steps in its own way; and not all that a simulator
does is in its files. A `Dialect` says how:

    NIR           the definition, by forward Euler with dt = 0.1 ms: hard reset, a spike above the threshold
    SNNTORCH      1.0: Leaky and Synaptic as they are by default. reset_delay=False is reset="prompt". For Leaky,
                  reset_mechanism="zero" is reset="hard" with detach=True (with reset_delay=False: detach=False). Synaptic
                  with "zero" has no dialect: it also drops the input of the step after a spike
    SPIKINGJELLY  2.0: a spike at the threshold, too
    NORSE         1.1, exported with its dt of 1 ms, by which it multiplies tau. Its importer does not multiply: to export
                  to it use Dialect(dt=1e-3, jumps=("IF",))
    SINABS        2.0 to 3.1: LIF, IAF and ExpLeak with spike_fn=SingleSpike (by default they spike several times a step) and
                  without min_v_mem; tau in steps; LIF(norm_input=False) is jumps=("LIF", "LI")

A file holds no surrogate: pass that of the exporter to get its gradients. By default snnTorch has `ATan(2)`, SpikingJelly
`Sigmoid(4)` (CUBALIFNode: `Rectangle(1)`), Norse `FastSigmoid(1)` (it does not use its alpha), and sinabs exp(-|u| / w) / w with
w half the threshold. One gradient differs: sinabs' SumPool2d gives none to a window of zeros, and `Pool` does.

With u the membrane before and v after the reset, a node steps as

    LIF      u[t] = v_leak + decay (v[t-1] - v_leak) + (1 - decay) r x[t],   decay = 1 - dt / tau or exp(-dt / tau)
    LI       the same, v = u its output
    CubaLIF  i[t] = decay_syn i[t-1] + (1 - decay_syn) w_in x[t], and LIF of i[t];   CubaLI likewise
    IF, I    u[t] = v[t-1] + dt r x[t]
    spike    s[t] = u[t] > v_threshold;   v[t] = (1 - s[t]) u[t] + s[t] v_reset

A neuron whose spikes go through a Linear or Affine back to itself is a `snnfuse.nn.Recurrent`: x[t] is what comes in, plus
W s[t-1] + b, with s[0] = 0.

from i = 0, v = v_leak (IF, I: 0). Pedersen et al. 2024, https://doi.org/10.1038/s41467-024-52259-9. Extra `nir`.

Layout. NIR's signals are [C, H, W], [C, L] or [N]; here [T, B, H, W, C], [T, B, L, C] or [T, B, N]. Weights and parameters
are turned around accordingly. `Flatten` keeps NIR's order, so the weights after it are as in the file; `to_nir` turns
those after `snnfuse.nn.flatten`.
"""

from snnfuse.interop.nir.dialect import NIR, NORSE, SINABS, SNNTORCH, SPIKINGJELLY, Dialect
from snnfuse.interop.nir.layers import Flatten, Graph, Pool, Scale, Shift, Threshold
from snnfuse.interop.nir.reading import from_nir
from snnfuse.interop.nir.writing import to_nir

__all__ = [
    "NIR",
    "NORSE",
    "SINABS",
    "SNNTORCH",
    "SPIKINGJELLY",
    "Dialect",
    "Flatten",
    "Graph",
    "Pool",
    "Scale",
    "Shift",
    "Threshold",
    "from_nir",
    "to_nir",
]
