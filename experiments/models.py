"""Models by name. One is a frozen dataclass of choices with T, `readout` and

build(shape, classes, rngs) -> a snnfuse.nn.Sequential: [T, B, *shape], what `encode` gives, to outputs [T, B, classes]
"""

from dataclasses import dataclass

from flax import nnx

from snnfuse import models, nn
from snnfuse.core.compose import CONNECTIONS
from snnfuse.models.build import MEMORY
from snnfuse.models.resnet import DEPTHS, STEMS
from snnfuse.ops.implementations import NAMES as IMPLEMENTATIONS

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
        _check(self, readout=READOUTS)

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


@dataclass(frozen=True)
class Resnet:
    """Spiking-ResNet-18, -34 or -50 of the temporal fusion paper (connect "sum", LIF neurons of decay 0.2 and threshold
    0.3), or SEW-ResNet ("add", "and", "iand", IF neurons): see `snnfuse.models`, whose options these are.
    """

    T: int = 32
    depth: int = 18
    connect: str = "sum"
    stem: str = "imagenet"
    policy: str = "bfloat16"
    memory: str = "packed"
    readout: str = "mean"
    implementation: str | None = None

    def __post_init__(self):
        _check(
            self,
            depth=DEPTHS,
            connect=("sum", *CONNECTIONS),
            stem=STEMS,
            policy=nn.PrecisionPolicy,
            memory=MEMORY,
            readout=READOUTS,
        )

    def build(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> nn.Sequential:
        make, connect = models.spiking_resnet, {}
        if self.connect != "sum":
            make, connect = models.sew_resnet, {"connect": self.connect}
        return make(
            self.depth,
            shape[-1],
            classes,
            **connect,
            stem=self.stem,
            policy=self.policy,
            memory=self.memory,
            implementation=self.implementation,
            rngs=rngs,
        )


def _check(model, **known):
    if model.T < 1:
        raise ValueError(f"--model.T must be at least 1; got {model.T}")
    for name, values in known.items():
        if (value := getattr(model, name)) not in tuple(values):
            raise ValueError(f"--model.{name} must be one of {', '.join(map(str, values))}; got {value!r}")
    if model.implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"--model.implementation must be none or one of {known}; got {model.implementation!r}")


MODELS = {"conv": ConvNet, "resnet": Resnet}
