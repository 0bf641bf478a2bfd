"""The work of the device: the model with its optimizer, a training step, and an evaluation step.

Each function returns the same step when it is called again with the same configuration, so that nothing is compiled twice.
"""

import contextlib
from collections.abc import Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from models import READOUTS, prepare
from runs import Stopped
from settings import Config

from snnfuse import nn, online, parallel, training
from snnfuse.data.loader import Batches, load
from snnfuse.nn import monitor


def create(config: Config, shape: tuple[int, ...], classes: int) -> tuple:
    """The model, its optimizer, and with --average the average of the model."""
    model = config.model.build(shape, classes, nnx.Rngs(config.seed))
    if config.mesh and config.sync_batch_norm:
        parallel.synchronise_batch_norm(model, "data")
    groups = tuple(nnx.to_flat_state(training.parameter_groups(model)))
    optimizer = nnx.Optimizer(model, transform(config, groups), wrt=nnx.Param)
    return (model, optimizer) if config.average is None else (model, optimizer, nnx.clone(model))


@lru_cache  # the same functions for the same configuration, so that what is compiled for it is found again
def transform(config, groups):
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

    @training.compiled_step(mesh=mesh_of(config))
    def train_step(*objects):
        *objects, data = objects
        batch, key = data.next()
        axes = axes_of(config)
        batch = {name: jnp.moveaxis(x, 0, axes.get(name, 0)) for name, x in batch.items()}
        return _update(config, objects, key, batch)

    return train_step


@lru_cache
def train_step_from_host(config: Config, names: tuple[str, ...]) -> training.CompiledStep:
    """A step on a batch {name: array} from the host, and the step's number."""
    specs = (_specs(config, names), PartitionSpec())

    @training.compiled_step(mesh=mesh_of(config), batch=specs if config.mesh else PartitionSpec())
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


def evaluate(config: Config, model: nnx.Module, source: Sequence[dict], batch: int = 250) -> tuple[dict, list]:
    """(the mean loss and accuracy over all samples of `source`, with --rates the firing rate of each layer; the answers)."""
    parts = [(*eval_step(config)(model, *some), some[0]["label"]) for some in _eval_batches(config, source, batch)]
    means = {name: float(sum(sums[name] for sums, *_ in parts)) / len(source) for name in parts[0][0]}
    return means, [answers for _, *answers in parts]


def joined(answers: list) -> tuple:
    """(logits [n, classes], labels [n]) of all samples, from the answers of `evaluate`."""
    logits, labels = (np.concatenate([np.asarray(part) for part in column]) for column in zip(*answers, strict=True))
    return logits[labels >= 0], labels[labels >= 0]


def _eval_batches(config, source, batch):
    """(a batch, the index of its first sample), until every sample was there."""
    mesh = mesh_of(config)
    batch += -batch % mesh.size if mesh else 0
    for i, some in enumerate(in_order(config, source, batch)):
        some = _filled(config, some, batch)
        if mesh:
            specs = _specs(config, some)
            some = {name: parallel.shard(x, mesh, specs[name]) for name, x in some.items()}
        yield some, np.int32(i * batch)


def lower_eval(config, model, source, batch):
    return eval_step(config).lower(model, *next(_eval_batches(config, source, batch)))


def in_order(config: Config, source: Sequence[dict], batch: int) -> Batches:
    """The samples of `source` once, as NumPy arrays, the last batch as it comes."""
    example = config.data.example()
    options = dict(shuffle=False, epochs=1, drop_remainder=False, device=False)
    return load(source, example, batch=batch, workers=config.workers, **options)


def axes_of(config):
    return getattr(config.data.example(), "axes", {})


def _specs(config, names):
    """How each array of a batch is cut over the devices: along its batch axis."""
    axes = axes_of(config)
    return {name: PartitionSpec(*(None,) * axes.get(name, 0), "data") for name in names}


def _filled(config, batch, size):
    """The batch with `size` samples: zeros of label -1 fill it."""
    axes, fill = axes_of(config), size - len(batch["label"])
    if not fill:
        return batch
    widths = lambda name, x: [(0, fill * (axis == axes.get(name, 0))) for axis in range(x.ndim)]
    return {name: np.pad(x, widths(name, x), constant_values=-1 if name == "label" else 0) for name, x in batch.items()}


def _key(config, use, step):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), use), step)


def mesh_of(config):
    if config.mesh is None:
        return None
    try:
        mesh = parallel.make_mesh(config.mesh)
    except ValueError as e:
        raise Stopped(f"--mesh {config.mesh}: {e}") from e
    if mesh.axis_names != ("data",):
        raise Stopped(f"--mesh must be data=N, the only axis this experiment has; got {config.mesh}")
    for name in ("batch", "second_batch"):
        if (size := getattr(config, name) or 0) % mesh.size:
            raise Stopped(f"--{name} must be a multiple of the {mesh.size} devices of --mesh; got {size}")
    return mesh
