"""Models by name. One is a frozen dataclass of choices with T, `readout` and

build(shape, classes, rngs) -> a snnfuse.nn.Sequential: [T, B, *shape] to outputs [T, B, classes]
"""

from dataclasses import dataclass

from flax import nnx

from snnfuse import nn
from snnfuse.ops.api import IMPLEMENTATIONS

READOUTS = {
    "rate": nn.spike_rate,
    "mean": nn.membrane_mean,
    "max": nn.membrane_max,
    "last": nn.membrane_last,
}


@dataclass(frozen=True)
class ConvNet:
    """Strided convolutions, one hidden dense layer and a leaky readout, all but that with LIF neurons that learn tau.

    `implementation` is that of `snnfuse.unroll`: none takes the fused kernels where they run.
    """

    T: int = 4
    channels: tuple[int, ...] = (32, 64)
    kernel: int = 5
    hidden: int = 128
    tau: float = 2.0
    readout: str = "mean"
    implementation: str | None = None

    def __post_init__(self):
        if self.T < 1:
            raise ValueError(f"--model.T must be at least 1; got {self.T}")
        if self.readout not in READOUTS:
            raise ValueError(f"--model.readout must be one of {', '.join(READOUTS)}; got {self.readout!r}")

        if self.implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"--model.implementation must be none or one of {', '.join(IMPLEMENTATIONS)}; got {self.implementation!r}"
            )

    def build(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> nn.Sequential:
        height, width, channels = shape
        neuron = {"tau": self.tau, "implementation": self.implementation}
        layers = []
        for wider in self.channels:
            size = (self.kernel, self.kernel) if not layers else (3, 3)
            layers += [
                nnx.Conv(channels, wider, size, strides=(2, 2), use_bias=False, rngs=rngs),
                nnx.BatchNorm(wider, momentum=0.9, rngs=rngs),
                nn.ParametricLIF(**neuron, decay_input=False),
            ]
            channels, height, width = wider, -(-height // 2), -(-width // 2)
        return nn.Sequential(
            *layers,
            nn.flatten,
            nnx.Linear(channels * height * width, self.hidden, use_bias=False, rngs=rngs),
            nnx.BatchNorm(self.hidden, momentum=0.9, rngs=rngs),
            nn.ParametricLIF(**neuron, decay_input=False),
            nnx.Linear(self.hidden, classes, rngs=rngs),
            nn.LI(**neuron),
        )


MODELS = {"conv": ConvNet}
