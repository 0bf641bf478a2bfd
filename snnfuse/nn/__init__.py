"""Flax NNX modules: thin ones that hold the parameters of the neurons and fold time for everything else."""

from snnfuse.nn.readout import membrane_last, membrane_max, membrane_mean, spike_rate
from snnfuse.nn.spiking import IF, LI, LIF, AdaptiveLIF, CubaLIF, ExpIF, Fixed, Izhikevich, ParametricLIF, Spiking
from snnfuse.nn.temporal import Folded, Sequential, Temporal, flatten

__all__ = [
    "IF",
    "LI",
    "LIF",
    "AdaptiveLIF",
    "CubaLIF",
    "ExpIF",
    "Fixed",
    "Folded",
    "Izhikevich",
    "ParametricLIF",
    "Sequential",
    "Spiking",
    "Temporal",
    "flatten",
    "membrane_last",
    "membrane_max",
    "membrane_mean",
    "spike_rate",
]
