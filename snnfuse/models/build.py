"""The options that all networks share, checked once, and the layers made with them."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any

import jax
from flax import nnx

from snnfuse import nn
from snnfuse.ops.packing import packed_for

MEMORY = ("fast", "packed", "lean")
_he_normal = nnx.initializers.variance_scaling(
    2.0, "fan_out", "normal"
)  # convolutions of PyTorch's and SpikingJelly's ResNets
torch_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # all layers of PyTorch itself


def check_option(name: str, value: Any, known: Sequence) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")


def rising(rate: float, blocks: int) -> list[float]:
    """The rate of `drop_path` for each of a network's blocks: 0 for the first one, `rate` for the last one or a single one."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path must be in [0, 1); got {rate}")
    return [rate * i / (blocks - 1) for i in range(blocks)] if blocks > 1 else [rate] * blocks


class Build:
    """Makes the layers and blocks of one network.

    Args:
      neuron: makes a neuron, `neuron(implementation=...)`.
      policy: see `snnfuse.nn.PrecisionPolicy`.
      memory: what is stored for the backward pass. "fast": outputs of convolutions, and spikes as numbers. "packed": the same,
        with spikes as bits. "lean": only the input of each block, as bits if it is spikes; the backward pass recomputes the
        block. Sums of spikes (connect "add") are not spikes and are stored as numbers.
      implementation: see `snnfuse.unroll`.
    """

    def __init__(
        self,
        neuron: Callable[..., nn.Spiking],
        policy: nn.PrecisionPolicy | str,
        memory: str,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        check_option("memory", memory, MEMORY)
        self.memory, self.policy, self.rngs = memory, nn.PrecisionPolicy(policy), rngs
        self.neuron = partial(neuron, implementation=implementation)
        self.norm = partial(nn.BatchNorm, rngs=rngs)

    def conv(self, features: int, width: int, size: int, *, stride: int = 1, **options: Any) -> nn.Conv:
        """A size x size convolution without bias, padded like PyTorch's with padding=size // 2."""
        options = self._precision(self.policy) | dict(kernel_init=_he_normal) | options
        return nn.Conv(features, width, (size, size), stride, padding=(size - 1) // 2, use_bias=False, **options)

    def linear(self, features: int, width: int, **options: Any) -> nn.Linear:
        """A dense layer without bias."""
        options = self._precision(self.policy) | dict(kernel_init=torch_uniform) | options
        return nn.Linear(features, width, use_bias=False, **options)

    def head(self, features: int, classes: int) -> nn.Linear:
        """The last layer, with a bias, in float32 whatever the policy."""
        bound = features**-0.5
        bias = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        options = self._precision(nn.PrecisionPolicy.FLOAT32)
        return nn.Linear(features, classes, kernel_init=torch_uniform, bias_init=bias, **options)

    def _precision(self, policy):
        return dict(dtype=policy.dtype, precision=policy.lax, rngs=self.rngs)

    def spiking(self, width: int, *, pack: bool = True, drop_path: float = 0.0, **options: Any) -> nn.NormSpiking:
        """Normalisation and neuron of `width` channels. It returns packed spikes if `pack`, unless memory is "fast"."""
        options["drop_path"] = nnx.Dropout(drop_path, rngs=self.rngs) if drop_path else None
        return nn.NormSpiking(self.neuron(), self.norm(width), pack=pack and self.memory != "fast", **options)

    def packed(self, factors: int = 1) -> list[nn.PackSpikes]:
        """A layer that packs spikes after a layer that does not, such as a max-pool; none if memory is "fast".

        `factors`: its input are products of so many spikes, whose range is larger if the spikes are graded.
        """
        spikes = packed_for(self.neuron().neuron)
        ends = [prod(some) for some in product((spikes.lowest, spikes.highest), repeat=factors)]
        if self.memory == "fast":
            return []
        if max(ends) - min(ends) > 255:
            raise ValueError(
                f"memory must be 'fast' for neurons with spikes from {spikes.lowest} to {spikes.highest}, because this network multiplies "
                f"{factors} of them and 8 bits hold 256 values (spikes from 0 to 15); got memory={self.memory!r}"
            )
        return [nn.PackSpikes(min(ends), max(ends))]

    def block(self, layer: nn.Temporal) -> nn.Temporal:
        """The layer, wrapped in `nn.Remat` if memory is "lean"."""
        return nn.Remat(layer) if self.memory == "lean" else layer
