"""The part of LayerNorm and RMSNorm before scale and bias, which run in the kernel of the neuron after them."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax


def check(name: str, norm: nnx.LayerNorm | nnx.RMSNorm) -> None:
    """Raises ValueError for a normalisation over anything but the features of a step."""
    for field, wanted in dict(reduction_axes=-1, feature_axes=-1, axis_name=None, dtype=None).items():
        if (got := getattr(norm, field)) not in (wanted, (wanted,)):
            raise ValueError(f"{name} must have {field}={wanted}; got {got}")


def affine(norm: nnx.LayerNorm | nnx.RMSNorm, xs: Array) -> tuple[Array, Array | None, Array | float]:
    """(the normalised xs, scale, shift): norm(xs) = scale normalised + shift. scale None means 1."""
    if xs.ndim < 3 or not xs.size or xs.shape[-1] != norm.num_features:
        raise ValueError(f"xs must be [T, B, ..., {norm.num_features}] without an empty axis; got {xs.shape}")
    if not jnp.issubdtype(xs.dtype, jnp.floating):
        raise TypeError(f"xs must be floating; got {xs.dtype}")
    value = lambda name: None if getattr(norm, name, None) is None else getattr(norm, name)[...]
    shift = value("bias")
    return (
        _normalised(xs, isinstance(norm, nnx.LayerNorm), norm.epsilon),
        value("scale"),
        0.0 if shift is None else shift,
    )


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _normalised(xs, centred, epsilon):
    """(xs - mean) / sqrt(var + epsilon) over the last axis, in the dtype of xs. Without `centred`, mean is 0."""
    return _forward(xs, centred, epsilon)[0]


def _forward(xs, centred, epsilon):
    wide = xs if xs.dtype == jnp.float64 else xs.astype(jnp.float32)
    away = wide - wide.mean(-1, keepdims=True) if centred else wide
    factor = lax.rsqrt((away * away).mean(-1, keepdims=True) + epsilon)
    ys = (away * factor).astype(xs.dtype)
    return ys, (ys, factor)  # xs need not be stored: its gradient follows from ys, which the neuron stores anyway


def _backward(centred, epsilon, kept, d_ys):
    ys, factor = kept
    y, d = ys.astype(factor.dtype), d_ys.astype(factor.dtype)
    d_xs = d - y * (d * y).mean(-1, keepdims=True) - (d.mean(-1, keepdims=True) if centred else 0)
    return ((factor * d_xs).astype(ys.dtype),)


_normalised.defvjp(_forward, _backward)
