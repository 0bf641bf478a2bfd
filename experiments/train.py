"""Train a spiking network; by default a convolutional one on 5,000 real MNIST digits.

    python experiments/train.py                              two minutes on 2 CPU cores; 96 % of the held-out digits
    python experiments/train.py --steps 100 --model.T 8 --data.encoding direct
    python experiments/train.py --mesh data=4                each step's batch over 4 devices
    python experiments/train.py --name mine --resume         continues runs/mine from its last checkpoint, exactly
    python experiments/train.py --model resnet --data random --data.like cifar10      another model, random input
    python experiments/train.py --model resnet --data cifar10 --help                  the keys of that model and data set

The runs of the temporal fusion paper are in paper.py. On a GPU the same commands run the fused kernels.

A run is a directory, runs/<name>:

    config.json          the configuration              metrics.jsonl   a row a step and a row an evaluation
    checkpoints/         Orbax, the last two            tensorboard/    the same metrics
    summary.json         how it ended                   report.png      curves, spikes and membranes
    mistakes.png         confusions, worst mistakes, energy; with --rates the firing rates of layers over training

Step k of a run depends on its configuration and on k alone: batches, encoding and augmentation are keyed by the step.
So a resumed run gives, bit for bit, the result of a run that never stopped.
"""

import interrupt  # isort: skip  # the first import: Ctrl-C during the others is one line, not a traceback

if __name__ == "__main__":
    interrupt.quietly()

import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Generic, TypeVar

import config as configuration
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from flax import nnx
from inputs import DATASETS
from jax.sharding import PartitionSpec
from models import MODELS, READOUTS, prepare
from runs import NOT_COMPARED, Meter, Run, Stopped, keep_compiled
from tqdm import tqdm

from snnfuse import nn, online, parallel, training
from snnfuse.data.loader import Batches, load
from snnfuse.nn import monitor

CHOICES = {"model": MODELS, "data": DATASETS}
Model, Data = TypeVar("Model"), TypeVar("Data")
SMALL = 2**20  # parameters; the step of a network with less is shorter than a call, even on a small GPU


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
    first_T: int | None = None
    """time steps of the network in the first --first_steps training steps; fewer are faster. None: always --model.T.
    Evaluations before --first_steps are those of that network, and metrics.jsonl calls them first_accuracy. With sound and signals a step is a window; there --first_T windows, which are longer, cover the recording"""
    first_levels: int | None = None
    """--model.levels in the first --first_steps training steps: with --first_T 1 a quantised ReLU network, which learns faster
    than spikes do, and whose weights the spiking network then takes over"""
    first_steps: int = 0
    second_rate: float | None = None
    """learning rate after the first steps, as a part of --learning_rate: it falls to 0 twice, at their end and at the last step.
    None: it falls once, over all steps"""
    neuron_rate: float = 1.0
    """learning rate of the neurons' parameters, as a multiple of --learning_rate"""
    loss: str = "mean"
    """cross-entropy of the readout (mean), or of the outputs of every time step (tet)"""
    piece: int | None = None
    """time steps of a piece of `nn.Pieces`, for long sequences: the backward pass recomputes one piece at a time. BatchNorm takes
    the statistics of each piece"""
    truncate: bool = False
    """cut the gradient between pieces: truncated backpropagation through time"""
    update_every: int | None = None
    """truncated backpropagation that changes the weights after every so many time steps (k1), while the states go on; the loss is that
    of these steps. None: once for a batch"""
    reach: int | None = None
    """time steps that its gradient goes back (k2), a multiple of --update_every; None: as many as that"""
    label_smoothing: float = 0.0
    """share of each label that is spread over all classes"""
    rate_upper: float | None = None
    """firing rate, in spikes a step, above which neurons are punished"""
    rate_lower: float | None = None
    """firing rate below which neurons are punished"""
    rate_weight: float = 1.0
    """of that punishment, beside the loss"""
    rate_per: str = "neuron"
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
    sync_batch_norm: bool = True
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
        if self.piece is not None and self.piece < 1 or self.truncate and self.piece is None:
            raise ValueError(f"--piece must be at least 1, and --truncate needs it; got {self.piece}")
        if self.piece is not None and (self.rate_lower, self.rate_upper) != (None, None):
            raise ValueError("--rate_lower and --rate_upper count over the whole sequence: not with --piece")
        self._check_update_every()
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"--average must be None or in [0, 1); got {self.average}")
        for name in ("seed", "workers", "on_device"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be at least 0; got {getattr(self, name)}")
        if (self.first_T is None) != (self.first_steps == 0) or not 0 <= self.first_steps < self.steps:
            raise ValueError(
                f"--first_T needs --first_steps, a number below --steps; got {self.first_T} and {self.first_steps}"
            )
        most = getattr(self.model, "T", np.inf)
        if self.first_T is not None and (not 1 <= self.first_T <= most or self.first_steps % self.log_every):
            raise ValueError(
                f"--first_T must be from 1 to --model.T, {most}, and --first_steps a multiple of --log_every; "
                f"got {self.first_T} and {self.first_steps}"
            )
        if self.second_rate is not None and not (
            0 < self.second_rate <= 1 and self.first_steps and self.schedule == "cosine"
        ):
            raise ValueError(
                f"--second_rate must be above 0 and at most 1, with --first_steps and --schedule cosine; got {self.second_rate}"
            )
        if self.first_levels is not None and (self.first_T is None or not hasattr(self.model, "levels")):
            raise ValueError(
                f"--first_levels needs --first_T, and a network of snnfuse.models; got {self.first_levels}, with "
                f"--first_T {self.first_T} and --model {self.model.name}"
            )
        _first(self)  # checks the options of the model
        K = self.steps_per_call
        if K is not None and (K < 1 or self.log_every % K or self.eval_every % K):
            raise ValueError(f"--steps_per_call must divide --log_every and --eval_every; got {K}")

    @property
    def updates(self) -> int:
        """How often the weights change in a training step."""
        return self.model.T // self.update_every if self.update_every else 1

    def _check_update_every(self):
        k1, k2, T = self.update_every, self.reach, self.model.T
        if k1 is None and k2 is not None or k1 is not None and (k1 < 1 or T % k1):
            raise ValueError(f"--update_every must divide --model.T, {T}, and --reach needs it; got {k1}")
        if k2 is not None and (k2 < 1 or k2 % k1):
            raise ValueError(f"--reach must be a multiple of --update_every, {k1}; got {k2}")
        others = dict(piece=self.piece, rate_lower=self.rate_lower, rate_upper=self.rate_upper, first_T=self.first_T)
        if k1 is not None and (given := [name for name, value in others.items() if value is not None]):
            raise ValueError(f"--update_every goes without --{given[0]}; got {others[given[0]]}")


def create(config: Config, shape: tuple[int, ...], classes: int) -> tuple:
    """The model, its optimizer, and with --average the average of the model."""
    model = config.model.build(shape, classes, nnx.Rngs(config.seed))
    if config.mesh and config.sync_batch_norm:
        parallel.synchronise_batch_norm(model, "data")
    groups = tuple(nnx.to_flat_state(training.parameter_groups(model)))
    optimizer = nnx.Optimizer(model, _transform(config, groups), wrt=nnx.Param)
    return (model, optimizer) if config.average is None else (model, optimizer, nnx.clone(model))


@lru_cache  # the same functions for the same configuration, so that what is compiled for it is found again
def _transform(config, groups):
    all, first = (steps * config.updates for steps in (config.steps, config.first_steps))
    warmup = int(config.warmup * (all if config.second_rate is None else first))
    if config.second_rate is not None:
        second = optax.cosine_decay_schedule(config.second_rate * config.learning_rate, all - first)
        falls = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, first)
        schedule = optax.join_schedules([falls, second], [first])
    elif config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, all)
    else:
        start = 0.0 if warmup else config.learning_rate  # without a warmup optax stays at the value that it starts from
        schedule = optax.warmup_constant_schedule(start, config.learning_rate, warmup)
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    only = lambda group: nnx.from_flat_state([(path, found == group) for path, found in groups])
    if config.optimizer == "sgd":
        decay = optax.add_decayed_weights(config.weight_decay, only("weight"))
        steps = optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))
    else:
        steps = optax.adamw(schedule, weight_decay=config.weight_decay, mask=only("weight"))
    return optax.chain(clip, steps, optax.masked(optax.scale(config.neuron_rate), only("neuron")))


def _update(config, objects, key, batch):
    """A step of `objects`: model, optimizer, and the average of the model if there is one."""
    model, optimizer, *average = objects
    model.train()
    prepare(config.model, model, optimizer.step[...] / (config.steps * config.updates))
    place, noise = jax.random.split(key)
    labels = batch["label"]
    targets = optax.smooth_labels(jax.nn.one_hot(labels, config.data.classes), config.label_smoothing)
    batch, targets = config.data.augment(place, batch, targets)
    xs = config.data.encode(noise, batch, config.model.T)

    band = {k: v for k, v in (("lower", config.rate_lower), ("upper", config.rate_upper)) if v is not None}

    def loss_of(outs):
        """(the loss, the part of the samples that are right)"""
        logits = READOUTS[config.model.readout](outs)
        if config.loss == "tet":
            loss = training.temporal_cross_entropy(outs, targets)
        else:
            loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (logits.argmax(-1) == labels).mean()

    def whole(model):
        options = dict(statistics="piece", truncate=config.truncate)
        run = nn.Pieces(model, config.piece, **options) if config.piece else model
        with _counting(model, bool(band)) as counts:
            outs = run(xs)[0]
        loss, accuracy = loss_of(outs)
        if band:
            loss += config.rate_weight * training.rate_penalty(counts, len(xs), per=config.rate_per, **band)
        return loss, accuracy

    if config.update_every:
        loss, accuracy, norm = _truncated(config, model, optimizer, loss_of, xs)
    else:
        (loss, accuracy), grads = nnx.value_and_grad(whole, has_aux=True)(model)
        grads = parallel.mean_gradients(grads)
        optimizer.update(model, grads)
        norm = optax.tree.norm(grads)
    if average:  # the first steps count less: their weights are far from those at the end
        step = optimizer.step[...].astype(jnp.float32)
        training.update_average(average[0], model, jnp.minimum(config.average, (1 + step) / (10 + step)))
    return {"loss": loss, "accuracy": accuracy, "grad_norm": norm}


def _truncated(config, model, optimizer, loss_of, xs):
    """An update after every --update_every steps of `xs`: the means of loss, accuracy and norm of the gradients."""
    k1 = config.update_every
    options = dict(length=k1, reach=config.reach or k1, has_aux=True)

    def update(model, optimizer, x, state):
        (loss, accuracy), grads, state = online.gradients(model, loss_of, x, state=state, **options)
        grads = parallel.mean_gradients(grads)
        optimizer.update(model, grads)
        return state, (loss, accuracy[0], optax.tree.norm(grads))

    def body(carry, x):
        variables, state = carry
        objects = nnx.merge(graphdef, variables)
        state, metrics = update(*objects, x, state)
        return (nnx.state(objects), state), metrics

    xs = xs.reshape(-1, k1, *xs.shape[1:])
    state, first = update(model, optimizer, xs[0], None)  # it makes the first state, so it is outside of the loop
    graphdef, variables = nnx.split((model, optimizer))
    (variables, _), others = jax.lax.scan(body, (variables, state), xs[1:])
    nnx.update((model, optimizer), variables)
    return jax.tree.map(lambda a, b: (a + b.sum(0)) / len(xs), first, others)


def _counting(model, wanted):
    """A block in which `model` runs, which fills a dictionary {layer: spike counts [B, ...]} if that is wanted."""
    return monitor.watch(model, what="counts") if wanted else contextlib.nullcontext({})


@lru_cache  # the functions below: what is compiled for a configuration is found again
def train_step(config: Config) -> training.CompiledStep:
    """A step on a batch of samples that live on the device."""

    @training.compiled_step(mesh=_mesh(config))
    def train_step(*objects):
        *objects, data = objects
        batch, key = data.next()
        axes = _axes(config)
        batch = {name: jnp.moveaxis(x, 0, axes.get(name, 0)) for name, x in batch.items()}
        return _update(config, objects, key, batch)

    return train_step


@lru_cache
def train_step_from_host(config: Config, names: tuple[str, ...]) -> training.CompiledStep:
    """A step on a batch {name: array} from the host, and the step's number."""
    specs = (_specs(config, names), PartitionSpec())

    @training.compiled_step(mesh=_mesh(config), batch=specs if config.mesh else PartitionSpec())
    def train_step(*args):
        *objects, batch, step = args
        return _update(config, objects, parallel.fold_key(_key(config, 0, step)), batch)

    return train_step


@lru_cache
def eval_step(config: Config) -> training.CompiledStep:
    """(sums over the samples whose label is not -1, the logits [B, classes]). The others only fill the last batch."""

    @training.compiled_step
    def eval_step(model, batch, index):
        model.eval()
        xs, labels = config.data.encode(_key(config, 1, index), batch, config.model.T), batch["label"]
        with _counting(model, config.rates) as counts:
            outs, state = model(xs)
        logits = READOUTS[config.model.readout](outs)
        real = labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(real, labels, 0))
        # a membrane that is NaN never spikes, and the loss alone would not show it
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in [logits, *jax.tree.leaves(state)]]).all()
        losses = jnp.where(finite, losses, jnp.nan)
        mean = lambda count: count.reshape(len(real), -1).mean(1) / len(xs)
        rates = {f"rate {path}": (mean(count) * real).sum() for path, count in counts.items()}
        sums = {"loss": (losses * real).sum(), "accuracy": ((logits.argmax(-1) == labels) & real).sum(), **rates}
        return sums, logits

    return eval_step


def evaluate(config: Config, model: nnx.Module, source: Sequence[dict], batch: int = 250) -> dict:
    """The mean loss and accuracy over all samples of `source`, and with --rates the firing rate of each layer."""
    sums = [eval_step(config)(model, *some)[0] for some in _eval_batches(config, source, batch)]
    return {name: float(sum(s[name] for s in sums)) / len(source) for name in sums[0]}


def predict(config: Config, model: nnx.Module, source: Sequence[dict], batch: int = 250) -> tuple:
    """(logits [n, classes], labels [n]) of all samples, by the program of `evaluate`."""
    parts = [(eval_step(config)(model, *some)[1], some[0]["label"]) for some in _eval_batches(config, source, batch)]
    logits, labels = (np.concatenate([np.asarray(part) for part in column]) for column in zip(*parts, strict=True))
    return logits[labels >= 0], labels[labels >= 0]


def _eval_batches(config, source, batch):
    """(a batch, the index of its first sample), until every sample was there."""
    mesh = _mesh(config)
    batch += -batch % mesh.size if mesh else 0
    for i, some in enumerate(in_order(config, source, batch)):
        some = _filled(config, some, batch)
        if mesh:
            specs = _specs(config, some)
            some = {name: parallel.shard(x, mesh, specs[name]) for name, x in some.items()}
        yield some, np.int32(i * batch)


def _lower_eval(config, model, source, batch):
    return eval_step(config).lower(model, *next(_eval_batches(config, source, batch)))


def in_order(config: Config, source: Sequence[dict], batch: int) -> Batches:
    """The samples of `source` once, as NumPy arrays, the last batch as it comes."""
    example = config.data.example()
    options = dict(shuffle=False, epochs=1, drop_remainder=False, device=False)
    return load(source, example, batch=batch, workers=config.workers, **options)


def _axes(config):
    return getattr(config.data.example(), "axes", {})


def _specs(config, names):
    """How each array of a batch is cut over the devices: along its batch axis."""
    axes = _axes(config)
    return {name: PartitionSpec(*(None,) * axes.get(name, 0), "data") for name in names}


def _filled(config, batch, size):
    """The batch with `size` samples: zeros of label -1 fill it."""
    axes, fill = _axes(config), size - len(batch["label"])
    if not fill:
        return batch
    widths = lambda name, x: [(0, fill * (axis == axes.get(name, 0))) for axis in range(x.ndim)]
    return {name: np.pad(x, widths(name, x), constant_values=-1 if name == "label" else 0) for name, x in batch.items()}


def _key(config, use, step):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), use), step)


def _mesh(config):
    if config.mesh is None:
        return None
    try:
        mesh = parallel.make_mesh(config.mesh)
    except ValueError as e:
        raise Stopped(f"--mesh {config.mesh}: {e}") from e
    if mesh.axis_names != ("data",):
        raise Stopped(f"--mesh must be data=N, the only axis this experiment has; got {config.mesh}")
    if config.batch % mesh.size:
        raise Stopped(f"--batch must be a multiple of the {mesh.size} devices of --mesh; got {config.batch}")
    return mesh


def _input_shape(config, source):
    """The shape of the model's input at one step, without T and B."""
    first = next(iter(in_order(config, source, 1)))
    made = lambda T: jax.eval_shape(partial(config.data.encode, T=T), jax.random.key(0), first)
    shape = lambda T: jax.tree.leaves(made(T))[0].shape[2:]  # of `nn.Padded` the values
    try:
        found = shape(config.model.T)
    except ValueError as e:
        raise Stopped(str(e)) from e
    if config.first_T is not None:
        try:
            shape(config.first_T)
        except ValueError as e:
            raise Stopped(f"--first_T {config.first_T} stands for --model.T in the first steps: {e}") from e
    return found


def _batches(config, fixed, source, start):
    """(a function of (objects, step, K) that trains K steps after `step`, one of (objects, step) that lowers that step).

    The second one is None if samples come from the host.
    """
    first = next(iter(in_order(config, source, 1)))
    if len(source) * sum(x.nbytes for x in first.values()) <= config.on_device * 2**20:
        axes, parts = _axes(config), list(in_order(config, source, 500))
        stored = {k: np.concatenate([np.moveaxis(part[k], axes.get(k, 0), 0) for part in parts]) for k in first}
        data = training.DeviceData(stored, config.batch, seed=config.seed)
        data.position[...] = jnp.int32(start)

        def on_device(objects, at, K):
            step = train_step(_at(fixed, at))
            return step(*objects, data) if K == 1 else step.scan(*objects, data, steps=K)

        return on_device, lambda objects, at: train_step(_at(fixed, at)).lower(*objects, data)
    if (config.steps_per_call or 1) > 1:
        raise Stopped("--steps_per_call above 1 needs the training samples on the device: see --on_device")
    options = dict(seed=config.seed, start=start, workers=config.workers, device=False if config.mesh else None)
    batches = iter(load(source, config.data.example(), batch=config.batch, **options))
    step = lambda at: train_step_from_host(_at(fixed, at), tuple(first))
    return lambda objects, at, K: step(at)(*objects, next(batches), np.int32(at + 1)), None


def _first(config):
    """The model of the first steps."""
    levels = {} if config.first_levels is None else dict(levels=config.first_levels)
    return config.model if config.first_T is None else dataclasses.replace(config.model, T=config.first_T, **levels)


def _at(config, step):
    """The configuration of the training step after `step`: fewer time steps at first, if --first_T says so."""
    return dataclasses.replace(config, model=_first(config)) if step < config.first_steps else config


def _steps_per_call(config, size, on_device):
    # A CPU takes seconds for a convolution inside of a loop that takes milliseconds outside of it.
    if config.steps_per_call or not on_device or size >= SMALL or jax.default_backend() == "cpu":
        return config.steps_per_call or 1
    return max(k for k in range(1, 33) if config.log_every % k == config.eval_every % k == 0)


def train(config: Config) -> dict:
    """Run to the end and return the summary. Raises Stopped."""
    config = dataclasses.replace(config, name=config.name or config.data.name)
    train_source, test_source = config.data.sources()
    run = Run(configuration.flatten(config))
    try:
        if config.data.note:
            print(f"{run.path}: {config.data.note}")
        if config.batch > len(train_source):
            raise Stopped(f"--batch must be at most the {len(train_source)} training samples; got {config.batch}")
        mesh = _mesh(config)
        unused = [f for f in dataclasses.fields(config) if f.name in NOT_COMPARED and f.name != "mesh"]
        fixed = dataclasses.replace(config, **{f.name: f.default for f in unused})  # steps are compiled for this
        began, shape = time.perf_counter(), _input_shape(config, train_source)
        objects = create(fixed, shape, config.data.classes)
        # Placed on its device, as a restored state is, so that a resumed run is the same compiled program.
        arrays = training.to_arrays(*objects)
        arrays = parallel.shard(arrays, mesh) if mesh else jax.device_put(arrays, jax.devices()[0])
        training.from_arrays(arrays, *objects)
        start = run.start(*objects)
        first = objects
        if config.first_levels is not None and start < config.first_steps:
            first = create(_at(fixed, start), shape, config.data.classes)
            _move(objects, first)
        size = sum(x.size for x in jax.tree.leaves(nnx.state(objects[0], nnx.Param)))
        print(f"{run.path}: {size:,} parameters, steps {start + 1} to {config.steps}, {jax.devices()[0].device_kind}")
        step, lower = _batches(config, fixed, train_source, start)
        K = _steps_per_call(config, size, lower is not None)
        print(f"training samples come from the {'device' if lower else 'host'}; steps in a call: {K}")
        lower = lower if K == 1 and start < config.steps else None
        _loop(run, config, fixed, first, objects, step, lower, K, test_source, start)
        return _finish(run, config, fixed, objects, len(train_source), test_source, time.perf_counter() - began)
    finally:
        run.close()


def _move(old, new):
    """Puts the arrays of the old objects into the new ones, whose neurons may be others."""
    training.from_arrays(training.to_arrays(*old), *new)


def _loop(run, config, fixed, first, objects, step, lower, K, test_source, start):
    meter, size = Meter(run, config.batch), min(250, 10 * config.batch)
    bar = tqdm(total=config.steps, initial=start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 5)
    if start < config.steps:
        kept = f" (programs are kept in {cache})" if (cache := jax.config.jax_compilation_cache_dir) else ""
        bar.write(f"compiling the first step{kept}", sys.stdout)
        sys.stdout.flush()
    # One program at a time, because XLA times kernels while it compiles; the others compile while the first one trains.
    with bar, ThreadPoolExecutor(max_workers=1) as pool, interrupt.noted() as interrupted:
        compiling, began = {}, time.perf_counter()
        trained = lambda at: first if at < config.first_steps else objects
        if lower:
            for at in dict.fromkeys([start, max(start, config.first_steps)]):
                compiling[at] = pool.submit(lower(trained(at), at).compile)
            for at in dict.fromkeys(
                [*([start] if config.eval_every <= config.first_steps else []), config.first_steps]
            ):
                lowered = _lower_eval(_at(fixed, at), _evaluated(trained(at)), test_source, size)
                compiling["eval", at >= config.first_steps] = pool.submit(lowered.compile)
        # after a resume the first call may be shorter, so that calls end at multiples of K, where logging and evaluation fall
        ends = [*range(start - start % K + K, config.steps, K), config.steps] if start < config.steps else []
        for before, now in itertools.pairwise([start, *ends]):
            if before in compiling:
                compiling.pop(before).result()
                bar.write(f"compiled after {time.perf_counter() - began:.0f} s", sys.stdout)
            meter.add(before + 1, step(trained(before), before, now - before))
            bar.update(now - before)
            stopping = now < config.steps and (before < (config.stop_at or 0) <= now or interrupted())
            evaluating = now % config.eval_every == 0 or now == config.steps
            if first is not objects and (evaluating or stopping or now == config.first_steps):
                _move(trained(before), objects)
            if now % config.log_every == 0 or evaluating or stopping:
                bar.set_postfix(meter.write(), refresh=False)
            if evaluating:
                kind = "eval" if now > config.first_steps else "first"
                if ("eval", kind == "eval") in compiling:
                    compiling.pop(("eval", kind == "eval")).result()
                row = evaluate(_at(fixed, before), _evaluated(trained(before)), test_source, size)
                run.record(now, {f"{kind}_{name}": value for name, value in row.items()})
                bar.write(
                    f"step {now:5d}   held out: loss {row['loss']:.4f}, accuracy {row['accuracy']:.2%}"
                    + " (network of the first steps)" * (kind == "first"),
                    sys.stdout,
                )
                meter.restart()
            if evaluating or stopping:
                run.save(now, *objects)
            if evaluating and not np.isfinite(row["loss"]):
                raise Stopped(
                    f"{kind}_loss is {row['loss']}, from the loss or from a membrane, at step {now}: stopped. "
                    "Try a smaller --learning_rate or --clip; start again, or from a checkpoint before this step"
                )
            if stopping:
                raise Stopped(
                    f"stopped after step {now}; continue with the same options and "
                    f"--name {run.path.name} --resume (checkpoint of step {run.saved()})"
                )


def _evaluated(objects):
    """The average of the model if there is one, else the model."""
    return objects[0] if len(objects) == 2 else objects[2]


def _finish(run, config, fixed, objects, examples, test_source, seconds):
    model = _evaluated(objects)
    run.save(config.steps, *objects)
    rows = run.rows()
    evals = [row for row in rows if "eval_accuracy" in row]
    speeds = [row["samples_per_s"] for row in rows if "samples_per_s" in row]
    summary = {"note": config.data.note} if config.data.note else {}
    summary |= {
        "held_out_accuracy": evals[-1]["eval_accuracy"],
        "best_held_out_accuracy": max(row["eval_accuracy"] for row in evals),
        "held_out_loss": evals[-1]["eval_loss"],
        "steps": config.steps,
        "epochs": config.steps * config.batch / examples,
        "seconds": seconds,
        "samples_per_s": float(np.median(speeds)),
        "checkpoint": run.saved(),
    }
    model.eval()
    summary["report"] = str(report.draw(run.path / "report.png", rows, config, model, test_source))
    predicted = predict(fixed, model, test_source, min(250, 10 * config.batch))
    summary["mistakes"] = str(
        report.draw_mistakes(run.path / "mistakes.png", rows, config, model, test_source, *predicted)
    )
    (run.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def main(arguments: list[str]) -> int:
    try:
        config = configuration.parse(arguments, Config(), CHOICES, __doc__)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    try:
        summary = train(config)
    except (Stopped, NotImplementedError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupt.MESSAGE, file=sys.stderr)
        return 130
    width = max(map(len, summary))
    print(
        "\n".join(
            f"{name:{width}}  {value:.4g}" if isinstance(value, float) else f"{name:{width}}  {value}"
            for name, value in summary.items()
        )
    )
    return 0


if __name__ == "__main__":
    keep_compiled()
    sys.exit(main(sys.argv[1:]))
