"""How each library is called: one small file a library, with the same few functions.

    SIDE            "jax" or "torch": the file beside these that times it
    REFERENCE       the neuron of ours (`cases.NEURONS`) that computes what this library's does
    lif(way, dtype) a function [T, ..., N] -> spikes of tau 2 (decay 0.5), threshold 1
    readout(way)    a function [T, ..., N] -> membranes of decay 0.9
    resnet(way)     of some: the network of `benchmarks/resnet.py`

A `way` is how the library is asked to run; the ways are named in `peers.PLAN`. Products with weights are formed for all
time steps at once, for everyone; that favours the libraries that would form one a step.
"""

import importlib
import sys
from unittest import mock


def not_needed(*names):
    """Lets a library be imported without packages that only its readers of files use."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = mock.MagicMock(__spec__=None)
