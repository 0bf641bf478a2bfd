"""Models by name. One is a frozen dataclass of choices with T, `readout` and

build(shape, classes, rngs) -> a snnfuse.nn.Sequential, from [T, B, *shape] to outputs [T, B, classes]
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from math import exp, inf, prod
from typing import Annotated

import jax.numpy as jnp
import tyro
from config import needs
from flax import nnx

from snnfuse import models, nn
from snnfuse.core import surrogate
from snnfuse.core.compose import CONNECTIONS
from snnfuse.core.reset import HardReset, SoftReset
from snnfuse.models.build import MEMORY
from snnfuse.models.resnet import DEPTHS, STEMS
from snnfuse.models.transformer import PATCHES
from snnfuse.models.vgg import STAGES
from snnfuse.ops.implementations import NAMES as IMPLEMENTATIONS
from snnfuse.ops.problem import PARTS
from snnfuse.papers import QCFS, QCFSParams

Name = Annotated[str, tyro.conf.arg(name="model", prefix_name=False, metavar="NAME")]
SURROGATES = {
    "atan": surrogate.ATan(),
    "sigmoid": surrogate.Sigmoid(),
    "triangle": surrogate.PiecewiseQuadratic(),
    "rectangle": surrogate.Rectangle(),
}
RESETS = {"hard": HardReset, "soft": SoftReset}
READOUTS = {
    "rate": nn.spike_rate,
    "mean": nn.membrane_mean,
    "max": nn.membrane_max,
    "last": nn.membrane_last,
}


@dataclass(frozen=True)
class ConvNet:
    """Strided convolutions and one hidden dense layer, with LIF neurons that learn tau; then a leaky readout."""

    name: Name = "conv"
    T: int = 4
    """time steps"""
    channels: tuple[int, ...] = (32, 64)
    """of each convolution"""
    kernel: Annotated[int, needs("channels")] = 5
    """width of the first convolution, in pixels"""
    hidden: int = 128
    tau: float = 2.0
    """time constant at the start, in steps"""
    dropout: float = 0.0
    """of channels and of hidden neurons, one mask for all steps"""
    readout: str = "mean"
    """how outputs over time become logits: rate, mean, max or last"""
    implementation: str | None = None
    """of snnfuse.unroll, such as scan or pallas; None takes the fused kernels where they run"""

    def __post_init__(self):
        _check(self, readout=READOUTS)

    def build(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> nn.Sequential:
        height, width, channels = shape
        neuron = {"tau": self.tau, "implementation": self.implementation}
        drop = lambda *axes: [nn.Dropout(self.dropout, rngs=rngs, broadcast_dims=(0, *axes))] if self.dropout else []
        layers = []
        for wider in self.channels:
            size = (self.kernel, self.kernel) if not layers else (3, 3)
            layers += [
                nnx.Conv(channels, wider, size, strides=(2, 2), use_bias=False, rngs=rngs),
                nnx.BatchNorm(wider, momentum=0.9, rngs=rngs),
                nn.ParametricLIF(**neuron, decay_input=False),
                *drop(2, 3),
            ]
            channels, height, width = wider, -(-height // 2), -(-width // 2)
        return nn.Sequential(
            *layers,
            nn.flatten,
            nnx.Linear(channels * height * width, self.hidden, use_bias=False, rngs=rngs),
            nnx.BatchNorm(self.hidden, momentum=0.9, rngs=rngs),
            nn.ParametricLIF(**neuron, decay_input=False),
            *drop(),
            nnx.Linear(self.hidden, classes, rngs=rngs),
            nn.LI(**neuron),
        )


@dataclass(frozen=True)
class Recurrent:
    """Dense layers of adaptive LIF neurons that learn their time constants, recurrent or not; then a leaky readout.

    Before them a convolution along the first axis of the input, such as mel bands, can find patterns wherever they lie there.
    """

    name: Name = "recurrent"
    T: int = 39
    """time steps"""
    hidden: tuple[int, ...] = (128, 128)
    """neurons of each layer"""
    channels: int = 0
    """of a convolution over neighbouring bands, with LIF neurons; 0: none"""
    kernel: Annotated[int, needs("channels")] = 8
    """bands that it spans"""
    recurrent: Annotated[bool, needs("hidden")] = True
    """False: the same network without connections from a layer to itself"""
    max_delay: Annotated[int, needs("hidden")] = 0
    """longest learned delay of a synapse between layers, in steps; 0: none. Delays need max_delay + 1 times the products"""
    tau: Annotated[float, needs("hidden")] = 3.0
    """time constant of the membrane at the start, in steps"""
    tau_adapt: Annotated[float, needs("hidden")] = 30.0
    """time constant of the threshold at the start"""
    beta: Annotated[float, needs("hidden")] = 0.2
    """how much a spike raises the threshold"""
    scale: Annotated[float, needs("recurrent"), needs("hidden")] = 0.5
    """of the recurrent weights at the start, which are orthogonal"""
    precision: Annotated[str, needs("recurrent"), needs("hidden")] = "float32"
    """of the product with the recurrent weights: float32, bfloat16x2 or bfloat16"""
    dropout: Annotated[float, needs("hidden")] = 0.0
    readout: str = "mean"
    """how outputs over time become logits: rate, mean, max or last"""
    implementation: str | None = None
    """of snnfuse.unroll, such as scan or triton; None takes the fused kernels where they run"""

    def __post_init__(self):
        _check(self, precision=PARTS, readout=READOUTS)
        if self.max_delay < 0:
            raise ValueError(f"--model.max_delay must be at least 0; got {self.max_delay}")

    def build(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> nn.Sequential:
        layers, features = [nn.flatten], prod(shape)
        if self.channels:
            width = -(-shape[0] // 2)
            convolution = nnx.Conv(
                features // shape[0], self.channels, (self.kernel,), strides=2, use_bias=False, rngs=rngs
            )
            norm = nnx.BatchNorm(self.channels, momentum=0.9, rngs=rngs)
            fires = nn.LIF(decay=0.5, decay_input=True, implementation=self.implementation)
            channels_last = _reshape(shape[0], features // shape[0])
            layers, features = [channels_last, convolution, norm, fires, nn.flatten], width * self.channels
        return nn.Sequential(*layers, *_dense(self, features, classes, rngs))


def _dense(model, features, classes, rngs) -> list:
    """The dense layers of a `Recurrent` or `TimeConvNet`, and its readout."""
    layers, longest = [], getattr(model, "max_delay", 0)
    connect = partial(nn.DelayedLinear, max_delay=longest) if longest else nnx.Linear
    for size in model.hidden:
        decays = {"decay": exp(-1 / model.tau), "decay_adapt": exp(-1 / model.tau_adapt)}
        options = {"learn": tuple(decays), "shape": (size,), "implementation": model.implementation}
        neuron = nn.AdaptiveLIF(**decays, beta=model.beta, decay_input=True, **options)
        if model.recurrent:
            neuron = nn.Recurrent(neuron, size, scale=model.scale, precision=model.precision, rngs=rngs)
        layers += [
            connect(features, size, use_bias=False, rngs=rngs),
            nnx.BatchNorm(size, momentum=0.9, rngs=rngs),
            neuron,
            *([nn.Dropout(model.dropout, rngs=rngs)] if model.dropout else []),
        ]
        features = size
    readout = nn.LI(decay=exp(-1 / 20), implementation=model.implementation)
    return [*layers, nnx.Linear(features, classes, rngs=rngs), readout]


def prepare(config, model: nnx.Module, progress) -> None:
    """Before a training step, after this part of all steps: delays narrow to half a step in the first three quarters."""
    if longest := getattr(config, "max_delay", 0):
        nn.sharpen(model, jnp.maximum(0.5, longest / 2 * longest ** (-progress / 0.75)))


@dataclass(frozen=True)
class TimeConvNet:
    """Convolutions over time and bands with LIF neurons, then dense layers of adaptive LIF neurons; then a leaky readout.

    Each convolution sees its own step and those before it, and halves the number of bands.
    """

    name: Name = "timeconv"
    T: int = 50
    """time steps"""
    channels: tuple[int, ...] = (32, 64, 96)
    """of each convolution"""
    steps: Annotated[int, needs("channels")] = 5
    """that a convolution sees"""
    bands: Annotated[int, needs("channels")] = 5
    """that a convolution sees, an odd number"""
    hidden: tuple[int, ...] = (256,)
    """neurons of each dense layer"""
    recurrent: Annotated[bool, needs("hidden")] = False
    """connections from each dense layer to itself"""
    tau: Annotated[float, needs("channels", "hidden")] = 3.0
    """time constant of the membranes at the start, in steps"""
    tau_adapt: Annotated[float, needs("hidden")] = 30.0
    """time constant of the thresholds of dense layers at the start"""
    beta: Annotated[float, needs("hidden")] = 0.2
    """how much a spike raises the threshold there"""
    scale: Annotated[float, needs("recurrent")] = 0.5
    """of the recurrent weights at the start, which are orthogonal"""
    dropout: Annotated[float, needs("channels", "hidden")] = 0.0
    """of channels and of dense features, one mask for all steps"""
    precision: Annotated[str, needs("recurrent")] = "float32"
    """of the product with recurrent weights: float32, bfloat16x2 or bfloat16"""
    readout: str = "mean"
    """how outputs over time become logits: rate, mean, max or last"""
    implementation: str | None = None
    """of snnfuse.unroll, such as scan or triton; None takes the fused kernels where they run"""

    def __post_init__(self):
        _check(self, precision=PARTS, readout=READOUTS)
        if self.steps < 1 or self.bands < 1 or self.bands % 2 == 0:
            raise ValueError(
                f"--model.steps must be at least 1 and --model.bands odd; got {self.steps} and {self.bands}"
            )

    def build(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> nn.Sequential:
        bands, inputs = shape[0], prod(shape[1:])
        layers = [_reshape(bands, inputs)]
        drop = lambda *axes: [nn.Dropout(self.dropout, rngs=rngs, broadcast_dims=(0, *axes))] if self.dropout else []
        for features in self.channels:
            fires = nn.LIF(decay=exp(-1 / self.tau), decay_input=True, implementation=self.implementation)
            layers += [
                nn.TimeConv(inputs, features, (self.steps, self.bands), strides=(2,), rngs=rngs),
                nnx.BatchNorm(features, momentum=0.9, rngs=rngs),
                fires,
                *drop(2),
            ]
            inputs, bands = features, -(-bands // 2)
        layers.append(nn.flatten)
        return nn.Sequential(*layers, *_dense(self, bands * inputs, classes, rngs))


@lru_cache  # one function for equal networks, so that the next one runs the program that the first one compiled
def _reshape(*shape):
    """[B, bands, ...] -> [B, bands, channels]."""
    return lambda x: x.reshape(-1, *shape)


@dataclass(frozen=True)
class Network:
    """The options that all networks of snnfuse.models share."""

    name: Name = ""
    T: int = 4
    """time steps"""
    tau: Annotated[float | None, needs(levels=None)] = None
    """LIF neurons of this time constant, in steps; inf: without a leak. None takes the neurons of snnfuse.models"""
    reset: Annotated[str, needs("tau")] = "hard"
    """what a spike does to the membrane, with --model.tau: hard sets it to 0, soft subtracts the threshold"""
    detach: Annotated[bool, needs("tau")] = True
    """no gradient passes through the reset, with --model.tau"""
    surrogate: Annotated[str, needs("tau")] = "atan"
    """gradient of a spike, with --model.tau: atan, sigmoid, triangle or rectangle, each of area 1"""
    v_rest: Annotated[float, needs("tau", "levels", "--first_levels")] = 0.0
    """membrane potential before the first step, and without input, with --model.tau; in thresholds. With --model.levels or
    --first_levels: what is added to an activation before it is rounded down, in levels"""
    scale: float = 1.0
    """of each normalisation at the start; with --model.tau, the deviation of what it gives to a neuron, in thresholds"""
    levels: int | None = None
    """in place of spikes, activations from 0 to 1 in so many levels: a quantised ReLU, the rate of a neuron over that many steps.
    To train spiking neurons after such a network, give --first_levels in place of it"""
    policy: str = "bfloat16"
    """number format of activations"""
    memory: str = "packed"
    """how much is stored for the backward pass"""
    readout: str = "mean"
    """how outputs over time become logits: rate, mean, max or last"""
    implementation: str | None = None
    """of snnfuse.unroll, such as scan or pallas; None takes the fused kernels where they run"""

    def __post_init__(self):
        known = dict(readout=READOUTS, surrogate=SURROGATES, reset=RESETS)
        _check(self, policy=nn.PrecisionPolicy, memory=MEMORY, **known)
        if not self.v_rest < 1:
            raise ValueError(f"--model.v_rest must be less than the threshold, 1; got {self.v_rest}")
        if not 0 < self.scale < inf:
            raise ValueError(f"--model.scale must be a finite number above 0; got {self.scale}")
        check_levels("--model.levels", self.levels, self.memory)

    @property
    def options(self) -> dict:
        """The options that all functions of snnfuse.models share."""
        options = {name: getattr(self, name) for name in ("policy", "memory", "implementation")}
        if self.levels is not None:
            options["neuron"] = partial(nn.Spiking, QCFS(self.levels, shift=self.v_rest), QCFSParams())
        elif self.tau is not None:
            choices = dict(
                reset=RESETS[self.reset](detach=self.detach), surrogate=SURROGATES[self.surrogate], v_rest=self.v_rest
            )
            options["neuron"] = partial(nn.LIF, tau=self.tau, **choices)
        return options

    def _scaled(self, model: nn.Sequential) -> nn.Sequential:
        """`model`, whose normalisations start with `scale`."""
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nn.BatchNorm) and self.scale != 1:
                module.scale[...] = jnp.full_like(module.scale[...], self.scale)
        return model


@dataclass(frozen=True)
class Resnet(Network):
    """Spiking-ResNet of the temporal fusion paper (connect sum), with a shortcut of membrane currents (membrane), or SEW-ResNet
    (add, and, iand). See snnfuse.models."""

    name: Name = "resnet"
    T: int = 32
    """time steps"""
    depth: int = 18
    connect: str = "sum"
    stem: str = "imagenet"
    drop_path: Annotated[float, needs(connect="add")] = 0.0
    """rate at which the last block drops its spikes for a whole sample; with --model.connect add"""

    def __post_init__(self):
        super().__post_init__()
        _check(self, depth=DEPTHS, connect=("sum", "membrane", *CONNECTIONS), stem=STEMS)
        _check_drop_path(self)

    def build(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> nn.Sequential:
        make, options = models.spiking_resnet, self.options
        if self.connect in CONNECTIONS:
            make, options = models.sew_resnet, options | {"connect": self.connect}
        else:
            options |= {"connect": self.connect}
        options |= {"stem": self.stem, "drop_path": self.drop_path}
        return self._scaled(make(self.depth, shape[-1], classes, rngs=rngs, **options))


@dataclass(frozen=True)
class Vgg(Network):
    """Spiking VGG-11 or -16 with BatchNorm. See snnfuse.models."""

    name: Name = "vgg"
    depth: int = 11
    hidden: int = 512
    """features of the two hidden dense layers"""

    def __post_init__(self):
        super().__post_init__()
        _check(self, depth=STAGES)

    def build(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> nn.Sequential:
        return self._scaled(
            models.spiking_vgg(self.depth, shape[-1], classes, hidden=self.hidden, rngs=rngs, **self.options)
        )


@dataclass(frozen=True)
class Spikformer(Network):
    """Spikformer-4-384, as on CIFAR. See snnfuse.models."""

    name: Name = "spikformer"
    depth: int = 4
    """encoder blocks"""
    width: int = 384
    """features of a token"""
    heads: int = 12
    patch: int = 4
    """side of a token, in pixels"""
    drop_path: float = 0.0
    """rate at which the last encoder block drops its spikes for a whole sample"""

    def __post_init__(self):
        super().__post_init__()
        _check_drop_path(self)
        _check(self, patch=PATCHES)
        if self.width % 8 or self.width % self.heads:
            raise ValueError(f"--model.width must be a multiple of 8 and of --model.heads; got {self.width}")

    def build(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> nn.Sequential:
        options = {name: getattr(self, name) for name in ("depth", "width", "heads", "patch", "drop_path")}
        return self._scaled(models.spikformer(shape[-1], classes, rngs=rngs, **options, **self.options))


@dataclass(frozen=True)
class Qkformer(Network):
    """QKFormer, HST-4-384, as on CIFAR. See snnfuse.models."""

    name: Name = "qkformer"
    depth: int = 4
    """encoder blocks"""
    width: int = 384
    """features of a token in the last stage"""
    heads: int = 8
    drop_path: float = 0.0
    """rate at which the last encoder block drops its spikes for a whole sample"""

    def __post_init__(self):
        super().__post_init__()
        _check_drop_path(self)
        if self.depth < 3:
            raise ValueError(f"--model.depth must be at least 3; got {self.depth}")
        if self.width % 8 or self.width // 4 % self.heads:
            raise ValueError(
                f"--model.width must be a multiple of 8, and its quarter one of --model.heads; got {self.width}"
            )

    def build(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs) -> nn.Sequential:
        options = {name: getattr(self, name) for name in ("depth", "width", "heads", "drop_path")}
        return self._scaled(models.qkformer(shape[-1], classes, rngs=rngs, **options, **self.options))


def check_levels(key, levels, memory):
    if levels is not None and (levels < 1 or memory != "fast"):
        raise ValueError(
            f"{key} must be at least 1, and needs --model.memory fast, because bits cannot hold levels; "
            f"got {levels} and {memory!r}"
        )


def _check_drop_path(model):
    if not 0 <= model.drop_path < 1:
        raise ValueError(f"--model.drop_path must be in [0, 1); got {model.drop_path}")


def _check(model, **known):
    if model.T < 1:
        raise ValueError(f"--model.T must be at least 1; got {model.T}")
    for name, values in known.items():
        if (value := getattr(model, name)) not in tuple(values):
            raise ValueError(f"--model.{name} must be one of {', '.join(map(str, values))}; got {value!r}")
    if model.implementation not in (None, *IMPLEMENTATIONS):
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"--model.implementation must be None or one of {known}; got {model.implementation!r}")


MODELS = {
    "conv": ConvNet(),
    "recurrent": Recurrent(),
    "timeconv": TimeConvNet(),
    "resnet": Resnet(),
    "vgg": Vgg(),
    "spikformer": Spikformer(),
    "qkformer": Qkformer(),
}
