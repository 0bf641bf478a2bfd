"""Flax NNX modules: neurons that hold their parameters, layers that run over time, and layers between them.

`snnfuse.nn.linear` says when to use `nn.Conv` and `nn.Linear`, and when Flax's own.
"""

from snnfuse.nn import monitor as monitor
from snnfuse.nn import summary as _summary  # noqa: F401  for nnx.tabulate
from snnfuse.nn.delay import Delay, DelayedLinear, sharpen
from snnfuse.nn.linear import Conv, Linear
from snnfuse.nn.neurons import IF, LI, LIF, AdaptiveLIF, CubaLIF, ExpIF, Izhikevich, ParametricLIF
from snnfuse.nn.norm import BatchNorm, NormSpiking
from snnfuse.nn.padded import Padded
from snnfuse.nn.pool import max_pool, mean_pool
from snnfuse.nn.precision import PrecisionPolicy
from snnfuse.nn.psn import PSN, MaskedPSN, SlidingPSN
from snnfuse.nn.quantised import Quantised
from snnfuse.nn.readout import membrane_last, membrane_max, membrane_mean, spike_rate
from snnfuse.nn.recurrent import Feedback, Recurrent
from snnfuse.nn.spikes import Spikes
from snnfuse.nn.spiking import Fixed, Spiking
from snnfuse.nn.stream import Stream
from snnfuse.nn.tebn import TEBN
from snnfuse.nn.temporal import (
    Dropout,
    Folded,
    PackSpikes,
    Pieces,
    Remat,
    Sequential,
    Temporal,
    Timeless,
    flatten,
    piece_length,
)
from snnfuse.nn.time_conv import TimeConv

__all__ = [
    "IF",
    "LI",
    "LIF",
    "PSN",
    "TEBN",
    "AdaptiveLIF",
    "BatchNorm",
    "Conv",
    "CubaLIF",
    "Delay",
    "DelayedLinear",
    "Dropout",
    "Feedback",
    "ExpIF",
    "Fixed",
    "Folded",
    "Izhikevich",
    "Linear",
    "MaskedPSN",
    "NormSpiking",
    "PackSpikes",
    "Padded",
    "ParametricLIF",
    "PrecisionPolicy",
    "Quantised",
    "Recurrent",
    "Pieces",
    "Remat",
    "Sequential",
    "SlidingPSN",
    "Spikes",
    "Spiking",
    "Stream",
    "TimeConv",
    "Timeless",
    "Temporal",
    "flatten",
    "max_pool",
    "mean_pool",
    "membrane_last",
    "membrane_max",
    "membrane_mean",
    "sharpen",
    "spike_rate",
    "piece_length",
]
