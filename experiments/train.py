"""Train a spiking network; by default a convolutional one on 5,000 real MNIST digits.

    python experiments/train.py                              a minute on 2 CPU cores; 97 % of the held-out digits
    python experiments/train.py --steps 100 --model.T 8 --data.encoding direct
    python experiments/train.py --mesh data=4                each step's batch over 4 devices
    python experiments/train.py --name mine --resume true    goes on from the last checkpoint of runs/mine, exactly
    python experiments/train.py --model resnet --data random --data.like cifar10      another model, random input

The runs of the temporal fusion paper are in paper.py.

`--help` lists every key. On a GPU the same commands run the fused kernels. A run is a directory, runs/<name>:

    config.json          the configuration              metrics.jsonl   a row a step and a row an evaluation
    checkpoints/         Orbax, the last two            tensorboard/    the same metrics
    summary.json         how it ended                   report.png      curves, spikes and membranes

Step k of a run depends on its configuration and on k alone (batches, encoding and augmentation are keyed by the step),
so a resumed run repeats, bit for bit, what it would have been.
"""

import dataclasses
import json
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import config as configuration
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from flax import nnx
from inputs import DATASETS, Mnist5k
from jax.sharding import PartitionSpec
from models import MODELS, READOUTS, ConvNet
from runs import NOT_COMPARED, Run, Stopped
from tqdm import tqdm

from snnfuse import parallel

CHOICES = {"model": MODELS, "data": DATASETS}


@dataclass(frozen=True)
class Config:
    """`stop_at`: stop there as if interrupted, to be resumed; `steps` alone shapes the schedule.

    `schedule`, after the warmup: cosine, to zero at the last step, or constant. `clip` none: gradients as they are. With a
    `weight_decay` of 0 AdamW is Adam.

    `mesh`: data=4 trains on 4 devices, each with a quarter of the batch and its own noise. `sync_batch_norm`: with the
    statistics of the whole batch, or each device with its own.
    """

    model: Any = ConvNet()
    data: Any = Mnist5k()
    steps: int = 400
    batch: int = 64
    learning_rate: float = 3e-3
    warmup: float = 0.1  # of the steps
    schedule: str = "cosine"
    weight_decay: float = 1e-2
    clip: float | None = 1.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 50
    name: str = "mnist5k"
    out: str = "runs"
    resume: bool = False
    stop_at: int | None = None
    mesh: str | None = None
    sync_batch_norm: bool = True

    def __post_init__(self):
        for name in ("steps", "batch", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup, a fraction of the steps, must be in [0, 1); got {self.warmup}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"--schedule must be cosine or constant; got {self.schedule!r}")


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
    """All of (model, optimizer) but its arrays. Those go through the step as a list: taking an nnx.State apart for every
    call, and hashing its graphdef, takes longer than a step of a ResNet on a GPU.
    """

    graphdef: Any
    tree: Any

    @cached_property
    def hash(self):
        return hash((self.graphdef, self.tree))

    def __hash__(self):
        return self.hash


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(config: Config, structure: Structure, arrays, images, labels, step):
    update = partial(_update, config, structure.graphdef)
    if config.mesh:  # it knows the statistics to average by their nnx.Variable
        update = parallel.data_parallel(update, parallel.make_mesh(config.mesh))
    state, metrics = update(structure.tree.unflatten(arrays), (images, labels), step)
    return jax.tree.leaves(state), metrics


def _update(config, graphdef, state, batch, step):
    images, labels = batch
    model, optimizer = nnx.merge(graphdef, state)
    model.train()
    xs = config.data.encode(parallel.fold_key(_key(config, 0, step)), images, config.model.T, train=True)

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
def eval_step(config: Config, graphdef, state, images, labels, index):
    """Sums over the images whose label is not -1 (those only fill the last batch)."""
    model, _ = nnx.merge(graphdef, state)
    model.eval()
    xs = config.data.encode(_key(config, 1, index), images, config.model.T, train=False)
    logits = READOUTS[config.model.readout](model(xs)[0])
    real = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(real, labels, 0))
    return {"loss": (losses * real).sum(), "accuracy": ((logits.argmax(-1) == labels) & real).sum()}


def evaluate(config: Config, graphdef, state, images: np.ndarray, labels: np.ndarray, batch: int = 250) -> dict:
    mesh = parallel.make_mesh(config.mesh) if config.mesh else None
    batch += -batch % mesh.size if mesh else 0
    sums = []
    for i in range(0, len(labels), batch):
        fill = max(0, i + batch - len(labels))
        some = np.pad(images[i : i + batch], ((0, fill), *((0, 0),) * (images.ndim - 1)))
        some = some, np.pad(labels[i : i + batch], (0, fill), constant_values=-1)
        if mesh:
            some = parallel.shard(some, mesh, PartitionSpec("data"))
        sums.append(eval_step(config, graphdef, state, *some, i))
    return {name: float(sum(s[name] for s in sums)) / len(labels) for name in sums[0]}


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


def _input_shape(config, data):
    """The shape of what the model is given at a step, without T and B."""
    encode = partial(config.data.encode, T=config.model.T, train=False)
    try:
        return jax.eval_shape(encode, jax.random.key(0), data.train_images[:1]).shape[2:]
    except ValueError as e:
        raise Stopped(str(e)) from e


def train(config: Config) -> dict:
    """Run to the end and return the summary. Raises Stopped."""
    data = config.data.load()
    run = Run(configuration.flatten(config, CHOICES))
    try:
        if data.note:
            print(f"{run.path}: {data.note}")
        if config.batch > len(data.train_labels):
            raise Stopped(f"--batch must be at most the {len(data.train_labels)} training images; got {config.batch}")
        mesh = _mesh(config)
        fixed = dataclasses.replace(config, **(dict.fromkeys(NOT_COMPARED) | {"mesh": config.mesh}))  # what is compiled
        graphdef, state = create(fixed, _input_shape(config, data), data.classes)
        # Placed on its device, as a restored state is, so that a resumed run is the same compiled program.
        state = parallel.shard(state, mesh) if mesh else jax.device_put(state, jax.devices()[0])
        start, state = run.start(state)
        size = sum(x.size for x in jax.tree.leaves(nnx.state(nnx.merge(graphdef, state)[0], nnx.Param)))
        print(f"{run.path}: {size:,} parameters, steps {start + 1} to {config.steps}, {jax.devices()[0].device_kind}")
        began = time.perf_counter()
        state = _loop(run, config, fixed, graphdef, data, start, state)
        return _finish(run, config, graphdef, state, data, time.perf_counter() - began)
    finally:
        run.close()


def _loop(run, config, fixed, graphdef, data, start, state):
    batches = data.batches(config.batch, config.seed, start)
    meter = Meter(run, config.batch)
    arrays, tree = jax.tree.flatten(state)
    structure = Structure(graphdef, tree)
    bar = tqdm(total=config.steps, initial=start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 5)
    with bar, _interruptible() as interrupted:
        for step in range(start + 1, config.steps + 1):
            images, labels = next(batches)
            arrays, metrics = train_step(fixed, structure, arrays, images, labels, step)
            meter.add(step, metrics)
            bar.update()
            stopping = step < config.steps and (step == config.stop_at or interrupted())
            evaluating = step % config.eval_every == 0 or step == config.steps
            if step % config.log_every == 0 or evaluating or stopping:
                bar.set_postfix(meter.write(), refresh=False)
            if evaluating:
                some = min(250, 10 * config.batch)
                row = evaluate(fixed, graphdef, tree.unflatten(arrays), data.test_images, data.test_labels, some)
                run.record(step, {f"eval_{name}": value for name, value in row.items()})
                bar.write(
                    f"step {step:5d}   held out: loss {row['loss']:.4f}, accuracy {row['accuracy']:.2%}", sys.stdout
                )
                meter.restart()
            if evaluating or stopping:
                run.save(step, tree.unflatten(arrays))
            if stopping:
                raise Stopped(
                    f"stopped after step {step}; go on with the same options and "
                    f"--name {run.path.name} --resume true (checkpoint of step {run.saved()})"
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


def _finish(run, config, graphdef, state, data, seconds):
    run.save(config.steps, state)
    rows = run.rows()
    evals = [row for row in rows if "eval_accuracy" in row]
    speeds = [row["samples_per_s"] for row in rows if "samples_per_s" in row]
    summary = {"note": data.note} if data.note else {}
    summary |= {
        "held_out_accuracy": evals[-1]["eval_accuracy"],
        "best_held_out_accuracy": max(row["eval_accuracy"] for row in evals),
        "held_out_loss": evals[-1]["eval_loss"],
        "steps": config.steps,
        "epochs": config.steps * config.batch / len(data.train_labels),
        "seconds": seconds,
        "samples_per_s": float(np.median(speeds)),
        "checkpoint": run.saved(),
    }
    model, _ = nnx.merge(graphdef, state)
    model.eval()
    summary["report"] = str(report.draw(run.path / "report.png", rows, config, model, data))
    (run.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__ + "\nThe keys and their defaults:\n" + configuration.help_text(Config(), CHOICES))
        return 0
    try:
        config = configuration.parse(arguments, Config(), CHOICES)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    try:
        summary = train(config)
    except (Stopped, NotImplementedError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
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
