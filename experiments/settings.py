"""The keys of train.py: what a run does. `model` and `data` have keys of their own.

`needs` marks a key that has no effect without another one, here and in the models and data sets.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Generic, TypeVar

import numpy as np
from config import needs
from inputs import DATASETS
from models import MODELS, Network, check_levels

CHOICES = {"model": MODELS, "data": DATASETS}
LIBRARY = tuple(name for name, model in MODELS.items() if isinstance(model, Network))
LEARNING = tuple(name for name in MODELS if name not in LIBRARY)  # their neurons have parameters that learn
Model, Data = TypeVar("Model"), TypeVar("Data")


@dataclass(frozen=True)
class Config(Generic[Model, Data]):
    """How to train."""

    model: Model = MODELS["conv"]
    data: Data = DATASETS["mnist5k"]
    steps: int = 400
    batch: int = 64
    learning_rate: float = 3e-3
    warmup: float = 0.1
    """part of the steps in which the learning rate rises"""
    schedule: str = "cosine"
    """after the warmup: cosine falls to zero at the last step; constant"""
    optimizer: str = "adamw"
    """adamw, or sgd with Nesterov momentum 0.9"""
    weight_decay: float = 1e-2
    """of weights alone, not of biases, normalisations and neurons; AdamW with 0 is Adam"""
    first_T: Annotated[int | None, needs("first_steps")] = None
    """time steps of the network in the first --first_steps training steps. None: always --model.T. Evaluations up to step
    --first_steps use this number too; metrics.jsonl calls their result first_accuracy. Sound and signals are cut into this
    many windows, which are then longer"""
    first_levels: Annotated[int | None, needs("first_T"), needs(model=LIBRARY)] = None
    """--model.levels in the first --first_steps training steps. With --first_T 1 they train a quantised ReLU network; the spiking
    network then takes over its weights"""
    first_steps: Annotated[int, needs("first_T")] = 0
    """the number of training steps for which --first_T and --first_levels hold"""
    second_rate: Annotated[float | None, needs("first_steps"), needs(schedule="cosine")] = None
    """the learning rate falls to 0 over the first steps, starts again at this part of --learning_rate, and falls to 0 at the last
    step. None: it falls once, over all steps"""
    second_batch: Annotated[int | None, needs("first_steps")] = None
    """samples in a batch after the first steps. None: as many as --batch. A convolution sees time steps times batch: if that product is
    the same before and after, XLA need not time its convolutions again"""
    neuron_rate: Annotated[float, needs(model=LEARNING)] = 1.0
    """learning rate of the neurons' parameters, as a multiple of --learning_rate"""
    loss: str = "mean"
    """cross-entropy of the readout (mean), or of the outputs of every time step (tet)"""
    piece: int | None = None
    """time steps of a piece of `nn.Pieces`, for long sequences: the backward pass recomputes one piece at a time. BatchNorm takes
    the statistics of each piece"""
    truncate: Annotated[bool, needs("piece")] = False
    """cut the gradient between pieces: truncated backpropagation through time"""
    update_every: int | None = None
    """truncated backpropagation that changes the weights after every so many time steps (k1), while the states go on; the loss is that
    of these steps. None: once for a batch"""
    reach: Annotated[int | None, needs("update_every")] = None
    """how many time steps the gradient of --update_every goes back (k2), a multiple of that number. None: the same number"""
    label_smoothing: float = 0.0
    """share of each label that is spread over all classes"""
    rate_upper: float | None = None
    """firing rate, in spikes a step, above which a penalty is added to the loss"""
    rate_lower: float | None = None
    """firing rate below which a penalty is added to the loss"""
    rate_weight: Annotated[float, needs("rate_lower", "rate_upper")] = 1.0
    """the factor of that penalty"""
    rate_per: Annotated[str, needs("rate_lower", "rate_upper")] = "neuron"
    """whose rate it is: neuron, channel or layer"""
    rates: bool = False
    """measure the firing rate of each layer at every evaluation, for report.png"""
    average: float | None = None
    """evaluate an exponential moving average of the weights with this decay, such as 0.999, instead of the weights"""
    clip: float | None = 1.0
    """largest norm of the gradients; None leaves them as they are"""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 50
    name: str | None = None
    """the run's directory inside --out; None: the name of the data set"""
    out: str = "runs"
    resume: bool = False
    """continue the run of that name from its last checkpoint"""
    stop_at: int | None = None
    """stop after the call with this step, as if interrupted, to be resumed; --steps alone shapes the schedule"""
    mesh: str | None = None
    """data=4 trains on 4 devices, each with a quarter of the batch and its own noise"""
    sync_batch_norm: Annotated[bool, needs("mesh")] = True
    """normalise with the statistics of the whole batch, not of each device's part"""
    workers: int = 0
    """processes that prepare batches; 0 prepares them in this one"""
    on_device: int = 1024
    """MiB: training samples that take at most this much stay on the device; others come from the host, batch by batch"""
    steps_per_call: int | None = None
    """steps that the device takes in one call, if the samples are there; None: on a GPU up to 32 for a network of less than
    a million parameters, 1 for a larger one, whose step is longer than a call, and on a CPU"""

    def __post_init__(self):
        for name in ("steps", "batch", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1; got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "neuron_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not (0 < value < np.inf or value == 0 and name != "clip"):
                raise ValueError(f"--{name} must be a finite number, at least 0 (--clip above 0); got {value}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup, a fraction of the steps, must be in [0, 1); got {self.warmup}")
        for name, known in dict(
            schedule=("cosine", "constant"), optimizer=("adamw", "sgd"), loss=("mean", "tet")
        ).items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"--{name} must be {known[0]} or {known[1]}; got {value!r}")
        if self.rate_per not in ("neuron", "channel", "layer") or not self.rate_weight >= 0:
            raise ValueError(
                f"--rate_per must be neuron, channel or layer, and --rate_weight at least 0; got {self.rate_per!r} and "
                f"{self.rate_weight}"
            )
        lower, upper = (x if x is not None else d for x, d in ((self.rate_lower, 0.0), (self.rate_upper, np.inf)))
        if not 0 <= lower <= upper:
            raise ValueError(
                f"--rate_lower must be from 0 to --rate_upper; got {self.rate_lower} and {self.rate_upper}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label_smoothing must be in [0, 1); got {self.label_smoothing}")
        if self.piece is not None and self.piece < 1:
            raise ValueError(f"--piece must be at least 1; got {self.piece}")
        if self.piece is not None and (self.rate_lower, self.rate_upper) != (None, None):
            raise ValueError("--rate_lower and --rate_upper count over the whole sequence: not with --piece")
        self._check_update_every()
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"--average must be None or in [0, 1); got {self.average}")
        for name in ("seed", "workers", "on_device"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be at least 0; got {getattr(self, name)}")
        if not 0 <= self.first_steps < self.steps:
            raise ValueError(f"--first_steps must be from 0 to less than --steps, {self.steps}; got {self.first_steps}")
        most = getattr(self.model, "T", np.inf)
        if self.first_T is not None and (not 1 <= self.first_T <= most or self.first_steps % self.log_every):
            raise ValueError(
                f"--first_T must be from 1 to --model.T, {most}, and --first_steps a multiple of --log_every; "
                f"got {self.first_T} and {self.first_steps}"
            )
        if self.second_batch is not None and self.second_batch < 1:
            raise ValueError(f"--second_batch must be at least 1; got {self.second_batch}")
        if self.second_rate is not None and not 0 < self.second_rate <= 1:
            raise ValueError(f"--second_rate must be above 0 and at most 1; got {self.second_rate}")
        if isinstance(self.model, Network):
            check_levels("--first_levels", self.first_levels, self.model.memory)
        first_model(self)  # checks the options of the model
        K = self.steps_per_call
        if K is not None and (K < 1 or self.log_every % K or self.eval_every % K):
            raise ValueError(f"--steps_per_call must divide --log_every and --eval_every; got {K}")

    @property
    def updates(self) -> int:
        """How often the weights change in a training step."""
        return self.model.T // self.update_every if self.update_every else 1

    def _check_update_every(self):
        k1, k2, T = self.update_every, self.reach, self.model.T
        if k1 is not None and (k1 < 1 or T % k1):
            raise ValueError(f"--update_every must divide --model.T, {T}; got {k1}")
        if k2 is not None and (k2 < 1 or k2 % (k1 or 1)):
            raise ValueError(f"--reach must be a multiple of --update_every, {k1}; got {k2}")
        others = dict(piece=self.piece, rate_lower=self.rate_lower, rate_upper=self.rate_upper, first_T=self.first_T)
        if k1 is not None and (given := [name for name, value in others.items() if value is not None]):
            raise ValueError(f"--update_every goes without --{given[0]}; got {others[given[0]]}")


def at_step(config, step):
    """The configuration of the step after `step`. With --first_T the first steps have another model; with --second_batch the
    later ones have another batch."""
    return _phases(config)[step >= config.first_steps]


@lru_cache  # called in every step, and a configuration checks all of its options when it is made
def _phases(config):
    first = dataclasses.replace(config, model=first_model(config))
    return first, dataclasses.replace(config, batch=config.second_batch or config.batch)


def first_model(config):
    """The model of the first steps."""
    has = config.first_levels is not None and hasattr(config.model, "levels")  # the command line refuses other networks
    levels = dict(levels=config.first_levels) if has else {}
    return config.model if config.first_T is None else dataclasses.replace(config.model, T=config.first_T, **levels)
