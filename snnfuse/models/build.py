"""What the networks share: their options, checked once, and the layers made with them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flax import nnx

from snnfuse import nn

MEMORY = ("fast", "packed", "lean")


def check_option(name: str, value: Any, known: Sequence) -> None:
    """Raises ValueError if `value` is none of `known`."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value!r}")


class Build:
    """Makes the layers and blocks of one network.

    Args:
      neuron: makes a neuron, `neuron(implementation=...)`.
      policy: see `snnfuse.nn.PrecisionPolicy`.
      memory: what is kept for the backward pass. "fast": conv outputs, and spikes as numbers; "packed": spikes as bits; "lean":
        of each block its input alone, spikes as bits, and the block runs again. What spikes are added to (connect "add") is
        no spike, and kept as numbers.
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
        self.memory, self.policy = memory, nn.PrecisionPolicy(policy)
        self.neuron = partial(neuron, implementation=implementation)
        self.conv = partial(nn.Conv, precision=self.policy, rngs=rngs)
        self.linear = partial(nn.Linear, precision=self.policy, rngs=rngs)
        self.norm = partial(nn.BatchNorm, rngs=rngs)

    def spiking(self, width: int, *, pack: bool = True, **options: Any) -> nn.NormSpiking:
        """Normalisation and neuron of `width` channels; `pack` where spikes are kept as bits at all."""
        return nn.NormSpiking(self.neuron(), self.norm(width), pack=pack and self.memory != "fast", **options)

    def packed(self) -> list[nn.PackSpikes]:
        """What makes bits of spikes that come without, such as those of a max-pool."""
        return [] if self.memory == "fast" else [nn.PackSpikes()]

    def block(self, layer: nn.Temporal) -> nn.Temporal:
        """The layer, as one that is run again if memory is to be lean."""
        return nn.Remat(layer) if self.memory == "lean" else layer
