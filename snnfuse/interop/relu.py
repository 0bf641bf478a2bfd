"""A trained ReLU network as a spiking network: the rate of a neuron is the activation of a ReLU."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from snnfuse import nn
from snnfuse.core.reset import SoftReset


def to_snn(network: nnx.Sequential | Sequence, samples: Array, *, percentile: float = 99.9) -> nn.Sequential:
    """A spiking network whose outputs, averaged over time, approach those of a ReLU network: [B, ...] -> xs [T, B, ...].

        snn = to_snn(network, images[:500])
        outs, _ = snn(jnp.broadcast_to(images, (T, *images.shape)))     # the same input at each step
        logits = outs[T // 4 :].mean(0)                                # the first steps, before the deep neurons fire, are left out

    Every ReLU becomes an `nn.IF` with soft reset and threshold 1. Weights are balanced, so that a neuron that spikes at every step
    stands for the given percentile of its ReLU layer's activations on the samples; larger ones are cut off. The network must be in
    evaluation mode, and it stays as it is.

    Args:
      network: an `nnx.Sequential`, or its layers: `nnx.Linear`, `nnx.Conv`, `nnx.BatchNorm` right after one of them, `jax.nn.relu` or
        `nnx.relu`, dropout, and functions f with f(2 x) = 2 f(x), such as a mean pooling or a reshape.
      samples: inputs [B, ...] that show the activations.
      percentile: above 0, at most 100, which is the largest activation.

    Rueckauer et al. 2017, https://doi.org/10.3389/fnins.2017.00682; soft reset: Rueckauer et al. 2016, https://arxiv.org/abs/1612.04052.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100; got {percentile}")
    given = network.layers if isinstance(network, nnx.Sequential) else network
    layers, x, scale, last = [], jnp.asarray(samples), 1.0, None
    for i, layer in enumerate(given):
        after = layer(x)
        if isinstance(layer, nnx.Linear | nnx.Conv):
            last = nnx.clone(layer)
            last.kernel[...] *= scale
            scale = 1.0
            layers.append(last)
        elif isinstance(layer, nnx.BatchNorm):
            _fold(i, layer, last if layers and layers[-1] is last else None)
        elif layer in (jax.nn.relu, nnx.relu):
            if last is None or layers[-1] is not last:
                raise NotImplementedError(f"layer {i}, a ReLU, must come right after a Linear, Conv or BatchNorm")
            largest = float(np.percentile(np.asarray(after), percentile))
            scale = largest if largest > 0 else 1.0
            last.kernel[...] /= scale
            if last.bias is not None:
                last.bias[...] /= scale
            layers.append(nn.IF(reset=SoftReset()))
        elif not isinstance(layer, nnx.Dropout):
            if not np.allclose(layer(2 * x), 2 * after, rtol=1e-4, atol=1e-6):
                raise NotImplementedError(f"layer {i} must keep a factor, f(2 x) = 2 f(x); {layer!r} does not")
            layers.append(layer)
        x = after
    if scale != 1.0:
        layers.append(lambda x: scale * x)  # the network ends with a ReLU
    return nn.Sequential(*layers)


def _fold(i, norm, last):
    """Multiplies a normalisation with running statistics into the layer before it."""
    if last is None or not norm.use_running_average:
        raise NotImplementedError(f"layer {i}, a BatchNorm, must be in evaluation mode, right after a Linear or Conv")
    factor = jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    factor = factor if norm.scale is None else factor * norm.scale[...]
    shift = -norm.mean[...] * factor + (0 if norm.bias is None else norm.bias[...])
    last.kernel[...] *= factor
    if last.bias is None:
        last.bias, last.use_bias = nnx.Param(shift), True
    else:
        last.bias[...] = last.bias[...] * factor + shift
