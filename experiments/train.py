"""Train a spiking network; by default a convolutional one on 5,000 real MNIST digits.

    python experiments/train.py                              a minute on 2 CPU cores; 97 % of the held-out digits
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

Step k of a run depends on its configuration and on k alone: batches, encoding and augmentation are keyed by the step.
So a resumed run gives, bit for bit, the result of a run that never stopped.
"""

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Generic, TypeVar

import config as configuration
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from flax import nnx
from inputs import DATASETS
from jax.sharding import PartitionSpec
from models import MODELS, READOUTS
from runs import NOT_COMPARED, Run, Stopped
from tqdm import tqdm

from snnfuse import parallel
from snnfuse.data.loader import Batches, load

CHOICES = {"model": MODELS, "data": DATASETS}
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
    weight_decay: float = 1e-2
    """of AdamW; with 0 it is Adam"""
    clip: float | None = 1.0
    """largest norm of the gradients; None leaves them as they are"""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 50
    name: str = "mnist5k"
    """the run's directory inside --out"""
    out: str = "runs"
    resume: bool = False
    """continue the run of that name from its last checkpoint"""
    stop_at: int | None = None
    """stop after this step, as if interrupted, to be resumed; --steps alone shapes the schedule"""
    mesh: str | None = None
    """data=4 trains on 4 devices, each with a quarter of the batch and its own noise"""
    sync_batch_norm: bool = True
    """normalise with the statistics of the whole batch, not of each device's part"""
    workers: int = 0
    """processes that prepare batches; 0 prepares them in this one"""

    def __post_init__(self):
        for name in ("steps", "batch", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup, a fraction of the steps, must be in [0, 1); got {self.warmup}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"--schedule must be cosine or constant; got {self.schedule!r}")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be at least 0; got {getattr(self, name)}")


def create(config: Config, shape: tuple[int, ...], classes: int):
    """(graphdef, state) of (model, optimizer)."""
    model = config.model.build(shape, classes, nnx.Rngs(config.seed))
    if config.mesh and config.sync_batch_norm:
        parallel.synchronise_batch_norm(model, "data")
    return nnx.split((model, nnx.Optimizer(model, _transform(config), wrt=nnx.Param)))


@lru_cache  # the same functions for the same configuration, so that what is compiled for it is found again
def _transform(config):
    warmup = int(config.warmup * config.steps)
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
    else:
        start = 0.0 if warmup else config.learning_rate  # without a warmup optax stays at the value that it starts from
        schedule = optax.warmup_constant_schedule(start, config.learning_rate, warmup)
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    return optax.chain(clip, optax.adamw(schedule, weight_decay=config.weight_decay))


@dataclass(frozen=True)
class Structure:
    """Everything in (model, optimizer) except the arrays. The arrays go through the step as a flat list.

    The reason is speed: to flatten an nnx.State and hash its graphdef in every call takes longer than a step of a ResNet
    on a GPU.
    """

    graphdef: Any
    tree: Any

    @cached_property
    def hash(self):
        return hash((self.graphdef, self.tree))

    def __hash__(self):
        return self.hash


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(config: Config, structure: Structure, arrays, batch, step):
    update = partial(_update, config, structure.graphdef)
    if config.mesh:  # data_parallel finds the statistics to average by their nnx.Variable
        mesh = parallel.make_mesh(config.mesh)
        update = parallel.data_parallel(update, mesh, batch=_specs(config, batch))
    state, metrics = update(structure.tree.unflatten(arrays), batch, step)
    return jax.tree.leaves(state), metrics


def _update(config, graphdef, state, batch, step):
    model, optimizer = nnx.merge(graphdef, state)
    model.train()
    xs = config.data.encode(parallel.fold_key(_key(config, 0, step)), batch, config.model.T)
    labels = batch["label"]

    def loss_of(model):
        logits = READOUTS[config.model.readout](model(xs)[0])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits.argmax(-1) == labels).mean()

    (loss, accuracy), grads = nnx.value_and_grad(loss_of, has_aux=True)(model)
    grads = parallel.mean_gradients(grads)
    optimizer.update(model, grads)
    metrics = {"loss": loss, "accuracy": accuracy, "grad_norm": optax.tree.norm(grads)}
    return nnx.state((model, optimizer)), metrics


@partial(jax.jit, static_argnums=(0, 1))
def eval_step(config: Config, graphdef, state, batch, index):
    """Sums over the samples whose label is not -1. The others only fill the last batch."""
    model, _ = nnx.merge(graphdef, state)
    model.eval()
    xs, labels = config.data.encode(_key(config, 1, index), batch, config.model.T), batch["label"]
    logits = READOUTS[config.model.readout](model(xs)[0])
    real = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(real, labels, 0))
    return {"loss": (losses * real).sum(), "accuracy": ((logits.argmax(-1) == labels) & real).sum()}


def evaluate(config: Config, graphdef, state, source: Sequence[dict], batch: int = 250) -> dict:
    """The mean loss and accuracy over all samples of `source`."""
    mesh = parallel.make_mesh(config.mesh) if config.mesh else None
    batch += -batch % mesh.size if mesh else 0
    sums = []
    for some in in_order(config, source, batch):
        index, some = batch * len(sums), _filled(config, some, batch)
        if mesh:
            specs = _specs(config, some)
            some = {name: parallel.shard(x, mesh, specs[name]) for name, x in some.items()}
        sums.append(eval_step(config, graphdef, state, some, index))
    return {name: float(sum(s[name] for s in sums)) / len(source) for name in sums[0]}


def in_order(config: Config, source: Sequence[dict], batch: int) -> Batches:
    """The samples of `source` once, as NumPy arrays, the last batch as it comes."""
    example = config.data.example(train=False)
    options = dict(shuffle=False, epochs=1, drop_remainder=False, device=False)
    return load(source, example, batch=batch, workers=config.workers, **options)


def _axes(config):
    return getattr(config.data.example(train=False), "axes", {})


def _specs(config, batch):
    """How each array of a batch is cut over the devices: along its batch axis."""
    axes = _axes(config)
    return {name: PartitionSpec(*(None,) * axes.get(name, 0), "data") for name in batch}


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
    encode = partial(config.data.encode, T=config.model.T)
    try:
        return jax.eval_shape(encode, jax.random.key(0), next(iter(in_order(config, source, 1)))).shape[2:]
    except ValueError as e:
        raise Stopped(str(e)) from e


def train(config: Config) -> dict:
    """Run to the end and return the summary. Raises Stopped."""
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
        graphdef, state = create(fixed, _input_shape(config, train_source), config.data.classes)
        # Placed on its device, as a restored state is, so that a resumed run is the same compiled program.
        state = parallel.shard(state, mesh) if mesh else jax.device_put(state, jax.devices()[0])
        start, state = run.start(state)
        size = sum(x.size for x in jax.tree.leaves(nnx.state(nnx.merge(graphdef, state)[0], nnx.Param)))
        print(f"{run.path}: {size:,} parameters, steps {start + 1} to {config.steps}, {jax.devices()[0].device_kind}")
        began = time.perf_counter()
        state = _loop(run, config, fixed, graphdef, train_source, test_source, start, state)
        seconds = time.perf_counter() - began
        return _finish(run, config, graphdef, state, len(train_source), test_source, seconds)
    finally:
        run.close()


def _loop(run, config, fixed, graphdef, train_source, test_source, start, state):
    # On a mesh train_step places the batches.
    options = dict(seed=config.seed, start=start, workers=config.workers, device=False if config.mesh else None)
    batches = iter(load(train_source, config.data.example(train=True), batch=config.batch, **options))
    meter = Meter(run, config.batch)
    arrays, tree = jax.tree.flatten(state)
    structure = Structure(graphdef, tree)
    bar = tqdm(total=config.steps, initial=start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 5)
    if start < config.steps:
        bar.write("compiling the first step", sys.stdout)
        sys.stdout.flush()
    with bar, _interruptible() as interrupted:
        for step in range(start + 1, config.steps + 1):
            arrays, metrics = train_step(fixed, structure, arrays, next(batches), step)
            meter.add(step, metrics)
            bar.update()
            stopping = step < config.steps and (step == config.stop_at or interrupted())
            evaluating = step % config.eval_every == 0 or step == config.steps
            if step % config.log_every == 0 or evaluating or stopping:
                bar.set_postfix(meter.write(), refresh=False)
            if evaluating:
                some = min(250, 10 * config.batch)
                row = evaluate(fixed, graphdef, tree.unflatten(arrays), test_source, some)
                run.record(step, {f"eval_{name}": value for name, value in row.items()})
                bar.write(
                    f"step {step:5d}   held out: loss {row['loss']:.4f}, accuracy {row['accuracy']:.2%}", sys.stdout
                )
                meter.restart()
            if evaluating or stopping:
                run.save(step, tree.unflatten(arrays))
            if stopping:
                raise Stopped(
                    f"stopped after step {step}; continue with the same options and "
                    f"--name {run.path.name} --resume (checkpoint of step {run.saved()})"
                )
    return tree.unflatten(arrays)


class Meter:
    """Metrics of steps that may still be running: fetched, checked and written together, so that the device never waits."""

    def __init__(self, run: Run, batch: int):
        self.run, self.batch = run, batch
        self.restart()

    def restart(self):
        self.pending, self.since = [], time.perf_counter()

    def add(self, step: int, metrics: dict):
        self.pending.append((step, metrics))

    def write(self) -> dict[str, str]:
        """Write what is pending. Returns what the progress bar shows. Raises Stopped at the first value not finite."""
        rows = [(step, {name: float(value) for name, value in row.items()}) for step, row in self.pending]
        speed = self.batch * len(rows) / (time.perf_counter() - self.since)
        for step, row in rows:
            if bad := [f"{name} is {value}" for name, value in row.items() if not np.isfinite(value)]:
                raise Stopped(
                    f"{', '.join(bad)} at step {step}: stopped. Try a smaller --learning_rate or --clip; "
                    f"{self.run.path} has its metrics, and its last checkpoint is of step {self.run.saved()}"
                )
            self.run.record(step, {**row, "samples_per_s": speed})
        self.restart()
        mean = {name: np.mean([row[name] for _, row in rows]) for name in rows[0][1]}
        return {"loss": f"{mean['loss']:.3f}", "acc": f"{mean['accuracy']:.1%}", "samples/s": f"{speed:.0f}"}


@contextmanager
def _interruptible():
    """A function that says whether Ctrl-C or SIGTERM came: the loop then ends between two steps, with a checkpoint."""
    came = []
    try:
        before = {s: signal.signal(s, lambda *_: came.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are not ours
        before = {}
    try:
        yield lambda: bool(came)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _finish(run, config, graphdef, state, examples, test_source, seconds):
    run.save(config.steps, state)
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
    model, _ = nnx.merge(graphdef, state)
    model.eval()
    summary["report"] = str(report.draw(run.path / "report.png", rows, config, model, test_source))
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
        print("error: interrupted before the first step; nothing was saved", file=sys.stderr)
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
    sys.exit(main(sys.argv[1:]))
