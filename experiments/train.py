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
    checkpoints/         Orbax, the last two            tensorboard/    their means over about --log_every steps
    summary.json         how it ended                   report.png      curves, spikes and membranes
    mistakes.png         confusions, worst mistakes, energy; with --rates the firing rates of layers over training

Step k of a run depends on its configuration and on k alone: batches, encoding and augmentation are keyed by the step.
So a resumed run gives, bit for bit, the result of a run that never stopped.
"""

import interrupt  # isort: skip  # the first import: Ctrl-C during the others is one line, not a traceback

if __name__ == "__main__":
    interrupt.quietly()

import dataclasses
import itertools
import json
import sys
import time
from functools import partial

import config as configuration
import jax
import jax.numpy as jnp
import numpy as np
import report
from flax import nnx
from jax.sharding import SingleDeviceSharding
from programs import Programs
from runs import NOT_COMPARED, Meter, Run, Stopped, keep_compiled
from settings import CHOICES, Config, at_step
from steps import axes_of, create, evaluate, in_order, joined, lower_eval, mesh_of, train_step, train_step_from_host
from tqdm import tqdm

from snnfuse import parallel, training
from snnfuse.data.loader import load

SMALL = 2**20  # parameters; the step of a network with less is shorter than a call, even on a small GPU


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


def _batches(config, fixed, source, start, size):
    """(train, lower, K): `train(objects, step, K)` takes the K steps after `step`; `lower(objects, step)` lowers the next one.

    `lower` is None if samples come from the host, if a call takes several steps, and if no step is left. The model has `size`
    parameters.
    """
    train, lower = _sampled(config, fixed, source, start)
    K = _steps_per_call(config, size, lower is not None)
    print(f"training samples come from the {'device' if lower else 'host'}; steps in a call: {K}")
    return train, lower if K == 1 and start < config.steps else None, K


def _sampled(config, fixed, source, start):
    """`train` of `_batches`, and `lower`, which is None if samples come from the host."""
    first = next(iter(in_order(config, source, 1)))
    if len(source) * sum(x.nbytes for x in first.values()) <= config.on_device * 2**20:
        axes, parts = axes_of(config), list(in_order(config, source, 500))
        stored = {k: np.concatenate([np.moveaxis(part[k], axes.get(k, 0), 0) for part in parts]) for k in first}
        data = training.DeviceData(stored, config.batch, seed=config.seed)
        data.position[...] = jnp.int32(start)

        def step_at(at):
            now = at_step(fixed, at)
            data.batch = now.batch
            return train_step(now)

        def on_device(objects, at, K):
            step = step_at(at)
            return step(*objects, data) if K == 1 else step.scan(*objects, data, steps=K)

        return on_device, lambda objects, at: step_at(at).lower(*objects, data)
    if (config.steps_per_call or 1) > 1:
        raise Stopped("--steps_per_call above 1 needs the training samples on the device: see --on_device")
    options = dict(seed=config.seed, workers=config.workers, device=False if config.mesh else None)

    def batches():
        for begin, end in ((start, config.first_steps), (max(start, config.first_steps), config.steps)):
            if begin < end:
                size = at_step(config, begin).batch
                loaded = load(source, config.data.example(), batch=size, start=begin, **options)
                yield from itertools.islice(loaded, end - begin)

    drawn = batches()
    step = lambda at: train_step_from_host(at_step(fixed, at), tuple(first))
    return lambda objects, at, K: step(at)(*objects, next(drawn), np.int32(at + 1)), None


def _steps_per_call(config, size, on_device):
    # A CPU takes seconds for a convolution inside of a loop that takes milliseconds outside of it.
    if config.steps_per_call or not on_device or size >= SMALL or jax.default_backend() == "cpu":
        return config.steps_per_call or 1
    return max(k for k in range(1, 33) if config.log_every % k == config.eval_every % k == 0)


def train(config: Config) -> dict:
    """Run to the end and return the summary. Raises Stopped."""
    config = dataclasses.replace(config, name=config.name or config.data.name)
    train_source, test_source = config.data.sources()
    config = dataclasses.replace(config, data=config.data.measured(train_source))
    run, programs = Run(configuration.flatten(config)), Programs()
    try:
        if config.data.note:
            print(f"{run.path}: {config.data.note}")
        for name in ("batch", "second_batch"):
            if (size := getattr(config, name) or 0) > len(train_source):
                raise Stopped(f"--{name} must be at most the {len(train_source)} training samples; got {size}")
        mesh = mesh_of(config)
        unused = [f for f in dataclasses.fields(config) if f.name in NOT_COMPARED and f.name != "mesh"]
        fixed = dataclasses.replace(config, **{f.name: f.default for f in unused})  # steps are compiled for this
        began, shape = time.perf_counter(), _input_shape(config, train_source)
        make = lambda at: create(at_step(fixed, at), shape, config.data.classes)
        has_first = config.first_levels is not None  # the first steps have other neurons
        shapes = nnx.eval_shape(lambda: make(0 if has_first else config.first_steps))
        if not mesh:  # over a mesh, shapes need no sharding
            _place_on_device(shapes)
        run.check_space(*shapes)
        size = sum(x.size for x in jax.tree.leaves(nnx.state(shapes[0], nnx.Param)))
        if not config.resume:  # the first step compiles while the weights are drawn
            batches = _batches(config, fixed, train_source, 0, size)
            if lower := batches[1]:
                programs.add(0, lower(shapes, 0))
        objects = make(config.first_steps)
        # Placed on its device, as a restored state is, so that a resumed run is the same compiled program.
        arrays = training.to_arrays(*objects)
        arrays = parallel.shard(arrays, mesh) if mesh else jax.device_put(arrays, jax.devices()[0])
        training.from_arrays(arrays, *objects)
        start = run.start(*objects)
        first = objects
        if has_first and start < config.first_steps:
            first = make(start)
            _move(objects, first)
        print(f"{run.path}: {size:,} parameters, steps {start + 1} to {config.steps}, {jax.devices()[0].device_kind}")
        if config.resume:
            batches = _batches(config, fixed, train_source, start, size)
        answers = _loop(run, config, fixed, first, objects, batches, test_source, start, programs)
        seconds = time.perf_counter() - began
        return _finish(run, config, fixed, objects, len(train_source), test_source, answers, seconds)
    finally:
        programs.close()
        run.close()


def _place_on_device(shapes):
    """Lets the objects, which hold shapes, say where the arrays will be."""
    sharding = SingleDeviceSharding(jax.devices()[0])
    placed = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type)
    for each in shapes:
        nnx.update(each, jax.tree.map(placed, nnx.state(each)))


def _move(old, new):
    """Puts the arrays of the old objects into the new ones, whose neurons may be others."""
    training.from_arrays(training.to_arrays(*old), *new)


def _loop(run, config, fixed, first, objects, batches, test_source, start, programs):
    """Trains, and returns the answers of the last evaluation; None if every step was taken before.

    `batches` is what `_batches` returns. The first of the programs may compile already; it trains while the others compile.
    """
    (step, lower, K), answers = batches, None
    meter = Meter(run)
    # calls that the device works on while the metrics of earlier ones are written
    ahead = min(12, -(-config.log_every // (2 * K)))
    bar = tqdm(total=config.steps, initial=start, unit="step", mininterval=0.5 if sys.stderr.isatty() else 5)
    if start < config.steps:
        cache = jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir
        kept = f" (programs are kept in {cache})" if cache else ""
        bar.write(f"compiling the first step{kept}", sys.stdout)
        sys.stdout.flush()
    with bar, interrupt.noted() as interrupted:
        trained = lambda at: first if at < config.first_steps else objects
        if lower:
            for at in dict.fromkeys([start, max(start, config.first_steps)]):
                if at not in programs:
                    programs.add(at, lower(trained(at), at))
            for at in dict.fromkeys([*([start] if start < config.first_steps else []), config.first_steps]):
                now = at_step(fixed, at)
                lowered = lower_eval(now, _evaluated(trained(at)), test_source, _eval_batch(now))
                programs.add(("eval", at >= config.first_steps), lowered)
        # after a resume the first call may be shorter, so that calls end at multiples of K, where logging and evaluation fall
        ends = [*range(start - start % K + K, config.steps, K), config.steps] if start < config.steps else []
        for before, now in itertools.pairwise([start, *ends]):
            if (seconds := programs.wait(before)) is not None:
                bar.write(f"compiled after {seconds:.0f} s", sys.stdout)
            used = at_step(fixed, before)
            meter.add(before + 1, step(trained(before), before, now - before), used.batch)
            bar.update(now - before)
            stopping = now < config.steps and (before < (config.stop_at or 0) <= now or interrupted())
            evaluating = now % config.eval_every == 0 or now in (config.first_steps, config.steps)
            if first is not objects and (evaluating or stopping or now == config.first_steps):
                _move(trained(before), objects)
            due = now % config.log_every == 0 or evaluating or stopping
            if due and (said := meter.write(0 if evaluating or stopping else ahead)):
                bar.set_postfix(said, refresh=False)
            if evaluating:
                kind = "eval" if now > config.first_steps else "first"
                programs.wait(("eval", kind == "eval"))
                row, answers = evaluate(used, _evaluated(trained(before)), test_source, _eval_batch(used))
                run.record([(now, {f"{kind}_{name}": value for name, value in row.items()})])
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
    return answers


def _eval_batch(config):
    """Samples in a call: the batch of training, whose convolutions XLA has already timed, unless that is small."""
    return max(config.batch, min(100, 10 * config.batch))


def _evaluated(objects):
    """The average of the model if there is one, else the model."""
    return objects[0] if len(objects) == 2 else objects[2]


def _finish(run, config, fixed, objects, examples, test_source, answers, seconds):
    model, last = _evaluated(objects), at_step(fixed, config.steps)
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
        "epochs": (config.first_steps * config.batch + (config.steps - config.first_steps) * last.batch) / examples,
        "seconds": seconds,
        "samples_per_s": float(np.median(speeds)),
        "checkpoint": run.saved(),
    }
    written = lambda: (run.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    written()  # before the figures, which take a while
    if answers is None:
        _, answers = evaluate(last, model, test_source, _eval_batch(last))
    model.eval()
    drawn = rows, config, model, test_source
    summary["report"] = str(report.draw(run.path / "report.png", *drawn))
    summary["mistakes"] = str(report.draw_mistakes(run.path / "mistakes.png", *drawn, *joined(answers)))
    written()
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
