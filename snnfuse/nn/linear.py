"""`nn.Conv` and `nn.Linear`: Flax's layers, which also take `Spikes`, and run convolutions in their fastest form.

Both take the arguments of `nnx.Conv` and `nnx.Linear`, hold the same variables and return the same values. When to use which:

* `nn.Conv` and `nn.Linear` between spiking layers. On [T, B, ...] they need no `Folded`. Called on `Spikes` they store one
  bit per spike for the backward pass; Flax's store the values. Convolutions of small maps and of images run in faster forms.
* `nnx.Conv` and `nnx.Linear` for a function of your own in place of `lax.conv_general_dilated`, `lax.dot_general` or Flax's
  `promote_dtype`, or for `preferred_element_type`: ours do not take these four.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import canonicalize_padding
from jax import Array, lax

from snnfuse.nn.convolution import convolve
from snnfuse.nn.spikes import Spikes, values
from snnfuse.nn.temporal import Timeless
from snnfuse.ops.packing import unpack

_lecun_normal, _zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()


class Conv(Timeless, nnx.Conv):
    """A convolution, [..., *space, I] -> [..., *space', O], with any axes before: `nnx.Conv` that also takes `Spikes`.

    Args:
      in_features, out_features: I and O.
      kernel_size: one size per axis of space: (3, 3) for images. As in Flax, an integer is a 1-D convolution.
      strides: an integer, or one per axis; default 1.
      padding: "SAME" (the default), "VALID", "CIRCULAR", "REFLECT", "CAUSAL" (1-D), an integer, or a (low, high) pair per axis.
      input_dilation, kernel_dilation, feature_group_count, mask: as in `nnx.Conv`.
      use_bias: True by default.
      dtype: of the computation and the output; default: what x and the parameters promote to.
      param_dtype: of the parameters, float32 by default.
      precision: that of `lax.Precision`, for the products.
      kernel_init, bias_init: initializers; by default `lecun_normal` and zeros.

    `kernel` is [*kernel_size, I / feature_group_count, O]. Called on `Spikes`, the layer stores their bits for the backward pass,
    not their values; the gradients are the same. The module's docstring says when to use `nnx.Conv` instead.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Any = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: Array | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable = _lecun_normal,
        bias_init: Callable = _zeros,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        groups = feature_group_count
        if groups < 1 or in_features % groups or out_features % groups:
            raise ValueError(
                f"feature_group_count must divide in_features {in_features} and out_features {out_features}; got {groups}"
            )
        rank = 1 if isinstance(kernel_size, int) else len(kernel_size)
        sizes = dict(kernel_size=kernel_size, strides=strides)
        for name, value in (sizes | dict(input_dilation=input_dilation, kernel_dilation=kernel_dilation)).items():
            per_axis(name, value, rank)
        if isinstance(padding, str) and padding not in ("SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL"):
            raise ValueError(f"padding must be SAME, VALID, CIRCULAR, REFLECT, CAUSAL or numbers; got {padding!r}")
        if padding == "CAUSAL" and rank > 1:
            raise ValueError(f"padding 'CAUSAL' is for 1-D convolutions; got kernel_size {tuple(kernel_size)}")
        if isinstance(padding, str) and set(per_axis("input_dilation", input_dilation, rank)) != {1}:
            raise ValueError(f"padding must be numbers where input_dilation is not 1; got {padding!r}")
        canonicalize_padding(padding, rank)  # checks it
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            padding=padding,
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
            feature_group_count=groups,
            use_bias=use_bias,
            mask=mask,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        if mask is not None and mask.shape != self.kernel_shape:
            raise ValueError(f"mask must have the shape of the kernel, {self.kernel_shape}; got {mask.shape}")

    def __call__(self, x: Array | Spikes) -> Array:
        shape, rank = values(x, type(self).__name__).shape, len(self.kernel_size)
        if len(shape) <= rank or shape[-1] != self.in_features:
            space = {1: "L", 2: "H, W", 3: "D, H, W"}.get(rank, "*space")
            raise ValueError(f"x must be [..., {space}, {self.in_features}]; got {shape}")
        kernel = self.kernel[...] if self.mask is None else self.kernel[...] * self.mask
        dtype = _dtype(self, x)
        return _with_bias(self, bilinear(self._convolve, x, kernel.astype(dtype)))

    def _convolve(self, x, kernel):
        rank = len(self.kernel_size)
        axes = lambda name: per_axis(name, getattr(self, name), rank)
        before, x = x.shape[: x.ndim - rank - 1], x.reshape(-1, *x.shape[-rank - 1 :])
        mode, pads = padding(self, x.shape[1:-1])
        if mode != "constant":
            x, pads = jnp.pad(x, [(0, 0), *pads, (0, 0)], mode=mode), [(0, 0)] * rank
        y = convolve(
            x,
            kernel,
            axes("strides"),
            pads,
            input_dilation=axes("input_dilation"),
            kernel_dilation=axes("kernel_dilation"),
            groups=self.feature_group_count,
            precision=self.precision,
        )
        return y.reshape(*before, *y.shape[1:])


class Linear(Timeless, nnx.Linear):
    """A dense layer, [..., I] -> [..., O]: `nnx.Linear` that also takes `Spikes`.

    Args:
      in_features, out_features: I and O.
      use_bias: True by default.
      dtype: of the computation and the output; default: what x and the parameters promote to.
      param_dtype: of the parameters, float32 by default.
      precision: that of `lax.Precision`, for the products.
      kernel_init, bias_init: initializers; by default `lecun_normal` and zeros.

    `kernel` is [I, O]. Called on `Spikes`, the layer stores their bits for the backward pass, not their values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable = _lecun_normal,
        bias_init: Callable = _zeros,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )

    def __call__(self, x: Array | Spikes) -> Array:
        shape = values(x, type(self).__name__).shape
        if shape[-1:] != (self.in_features,):
            raise ValueError(f"x must be [..., {self.in_features}]; got {shape}")
        product = lambda x, kernel: jnp.matmul(x.astype(kernel.dtype), kernel, precision=self.precision)
        return _with_bias(self, bilinear(product, x, self.kernel[...].astype(_dtype(self, x))))


def bilinear(f: Callable, x: Array | Spikes, kernel: Array) -> Array:
    """f(x, kernel), in the dtype of the kernel; for `Spikes` the backward pass stores their bits, and not their values.

    f is linear in each argument. An x of a smaller dtype (bool, uint8) reaches f as it is: f must cast it where it needs it.
    """
    if not isinstance(x, Spikes):
        return f(x if x.dtype.itemsize < kernel.dtype.itemsize else x.astype(kernel.dtype), kernel)
    how = f, x.values.shape[0], x.lowest
    return _of_spikes(how, x.values.astype(kernel.dtype), x.bits, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_spikes(how, x, bits, kernel):
    return how[0](x, kernel)


def _of_spikes_forward(how, x, bits, kernel):
    return how[0](x, kernel), (bits, kernel)


def _of_spikes_backward(how, residuals, d_y):
    (f, T, lowest), (bits, kernel) = how, residuals
    d_x, d_kernel = jax.vjp(f, unpack(bits, T, kernel.dtype, lowest=lowest), kernel)[1](d_y)
    return d_x, jax.tree.map(lambda words: np.zeros(words.shape, jax.dtypes.float0), bits), d_kernel


_of_spikes.defvjp(_of_spikes_forward, _of_spikes_backward)


def _dtype(layer, x):
    bias = None if layer.bias is None else layer.bias[...]
    return dtypes.canonicalize_dtype(values(x), layer.kernel[...], bias, dtype=layer.dtype)


def _with_bias(layer, y):
    return y if layer.bias is None else y + jnp.broadcast_to(layer.bias[...].astype(y.dtype), y.shape)


def padding(layer: nnx.Conv, space: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """(the mode of `jnp.pad`, (low, high) of each axis) of a convolution over a map of this size."""
    rank = len(space)
    strides, dilation = (per_axis(name, getattr(layer, name), rank) for name in ("strides", "kernel_dilation"))
    spans = [(k - 1) * d for k, d in zip(layer.kernel_size, dilation, strict=True)]
    if layer.padding in ("CIRCULAR", "REFLECT"):
        mode = "wrap" if layer.padding == "CIRCULAR" else "reflect"
        return mode, [(s // 2, s - s // 2) for s in spans]
    if layer.padding == "CAUSAL":
        return "constant", [(spans[0], 0)]
    if isinstance(layer.padding, str):
        return "constant", lax.padtype_to_pads(space, [s + 1 for s in spans], strides, layer.padding)
    return "constant", canonicalize_padding(layer.padding, rank)


def per_axis(name, value, rank):
    sizes = (1 if value is None else value,) * rank if isinstance(value, int | None) else tuple(value)
    if len(sizes) != rank or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"{name} must be a positive integer, or one for each of {rank} axes; got {value!r}")
    return sizes
