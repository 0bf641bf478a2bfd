"""What does it cost to call a training step, and how close does a call come to the time that the GPU works?

    python benchmarks/step_calls.py                          on a GPU; 5 minutes on an H100, most of it compiling
    python benchmarks/step_calls.py --only host              the host alone; also on a CPU
    python benchmarks/step_calls.py --ways compiled_step,scan,relu,spikingjelly --only '(sew|vgg|spikformer)'

Ways to call the same step, written once as a function of (model, optimizer, arrays):

    nnx.jit          as Flax documents it
    cached_partial   nnx.cached_partial of it
    flat             jax.jit of a flat, donated list of arrays: what the others are compared with
    compiled_step    snnfuse.training.compiled_step
    joined           compiled_step, with an optimizer in parallel.flatten_optimizer: it holds fewer arrays

The four networks of SpikingJelly's model zoo (T = 4, in bfloat16) also run by "scan" and with "relu" in place of the neurons,
both called by `compiled_step`, and as "spikingjelly", which is its own network in TF32 as its users call it (by Triton kernels).
Further words choose how SpikingJelly runs: "channels_last", that layout; "bfloat16", autocast, for SEW-ResNet only; "graph", a
CUDA graph of the whole step (`call_ms` is the same step without it); "compiled", torch.compile. QKFormer is not in that zoo.

    python benchmarks/step_calls.py --only sew.*cifar --ways 'compiled_step,spikingjelly graph bfloat16 channels_last'

Rows of the case "host" hold `call_ms`: the milliseconds until a call returns, with the 228 variables of SEW-ResNet-18 and
Adam ("joined": 108), each a single number, so that nothing is computed. The other rows are whole training steps. `ms` is wall time of a
call when calls follow each other, `busy_ms` the time that the GPU works in it. Small networks also take K = `steps` steps
in a call, and read their data from the device (`DeviceData`).

    python benchmarks/step_calls.py resnet                   Spiking-ResNet-18, T=32, B=100, 3 x 28 x 28; minutes on an H100
    python benchmarks/step_calls.py resnet --kinds pallas,relu --dtypes bfloat16 --shapes 28,32,dvs --depths 18,34,50

"resnet" is a step of the ResNets for T = 32, on random spikes of rate 0.5, with 8 different batches in turn. Kind "relu" has ReLU
in place of the neurons. `peak_mb` is what the program of the step holds: parameters, optimizer, batch and temporary arrays.
"""

import functools
import glob
import itertools
import statistics
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import graphlib
from runner import Case, each_ms, job, main, question, split
from with_jax import ADAM, JOINED, batches, compile_then_time, resnet, step_of, training_step, with_adam, with_relu

from snnfuse import models, nn, training

WAYS = ("compiled_step", "joined", "flat", "cached_partial", "nnx.jit")
WORKLOADS = {  # B, size, classes, how to build: the four of SpikingJelly's model zoo, T = 4, and one that is not in it
    "sew-resnet-18": (32, 224, 1000, functools.partial(models.sew_resnet, 18, stem="imagenet")),
    "vgg-11": (128, 32, 10, functools.partial(models.spiking_vgg, 11)),
    "spikformer-4-384": (64, 32, 10, functools.partial(models.spikformer, depth=4, width=384, heads=12)),
    "sew-resnet-18-cifar": (128, 32, 10, functools.partial(models.sew_resnet, 18, stem="cifar")),
    "qkformer-4-384": (64, 32, 10, models.qkformer),
}
SMALL = {
    "mnist 784-1000-10": (25, 64, (784, 1000, 10)),
    "shd 700-256-256-20": (100, 256, (700, 256, 256, 20)),
}  # T, B, N
T = 4
IMAGES = {"28": (100, 28), "32": (100, 32), "dvs": (10, 128)}  # B, H = W, of "resnet"


@question("step_calls", gpu=False, ways=("compiled_step,nnx.jit", "ways of the networks, as above"))
def cases(args):
    for way in WAYS:
        yield Case(dict(case="host", implementation=way), host, (way, 3 if args.tiny else 200))
    if not (args.tiny or jax.default_backend() == "gpu"):
        return
    first, *others = split(args.ways)
    yield from workloads([first], args)
    for name, (steps_of_time, B, _) in SMALL.items():
        for way, steps in (("nnx.jit", 1), ("compiled_step", 1), ("compiled_step", 32), ("DeviceData", 32)):
            key = dict(case=name, implementation=way, T=steps_of_time, B=B, dtype="float32", steps=steps)
            yield Case(key, small, (name, way, steps, args.tiny), job(args))
    yield from workloads(others, args)


def workloads(ways, args):
    for way in ways:
        for name, (B, size, _, _) in WORKLOADS.items():
            theirs = way.startswith("spikingjelly")
            if "bfloat16" in way and not name.startswith("sew") or theirs and name.startswith("qkformer"):
                continue
            dtype = "tf32" if theirs and "bfloat16" not in way else "bfloat16"
            key = dict(case=name, implementation=way, T=T, B=B, size=size, dtype=dtype)
            # a failed capture or compilation leaves PyTorch unusable
            process = way if "graph" in way or "compiled" in way else "torch"
            measure, where = (by_spikingjelly, process) if theirs else (workload, job(args))
            yield Case(key, measure, (name, way, args.tiny), where)


def bind(way, step, objects):
    """`step` on `objects` as a function of the arrays alone."""
    if way in ("compiled_step", "joined"):
        return functools.partial(training.compiled_step(step), *objects)
    if way == "nnx.jit":
        return functools.partial(nnx.jit(step), *objects)
    if way == "cached_partial":
        return nnx.cached_partial(nnx.jit(step), *objects)
    graphdef, state = nnx.split(objects)
    leaves, tree = jax.tree.flatten(state)
    held = [[jnp.copy(leaf) for leaf in leaves]]

    @functools.partial(jax.jit, donate_argnums=0)
    def flat(leaves, *arrays):
        objects = nnx.merge(graphdef, tree.unflatten(leaves))
        out = step(*objects, *arrays)
        return jax.tree.leaves(nnx.state(objects)), out

    def call(*arrays):
        held[0], out = flat(held[0], *arrays)
        return out

    return call


def host(way, calls):
    model = models.sew_resnet(18, 3, 10, stem="cifar", rngs=nnx.Rngs(0))
    objects = with_adam(model, JOINED if way == "joined" else ADAM)
    variables = lambda objects: graphlib.flatten(objects, graph=True)[1].leaves
    for variable in variables(objects):
        variable.set_raw_value(jnp.zeros((), variable.get_raw_value().dtype))

    def step(model, optimizer, x):
        for variable in variables((model, optimizer)):
            variable.set_raw_value(variable.get_raw_value() + 1)
        return x.sum()

    call, x = bind(way, step, objects), jnp.ones(8)
    low, call_ms, high = statistics.quantiles(each_ms(lambda: call(x), calls, jax.block_until_ready)[1:], n=4)
    return dict(call_ms=call_ms, call_quartiles=(low, high), variables=len(variables(objects)))


def timed(call, data, samples):
    """`compile_then_time`, and the busy milliseconds of a call, which takes so many samples."""
    halves = compile_then_time(call, data)
    yield next(halves)
    row = next(halves)
    row |= dict(samples_per_s=samples / row["ms"] * 1e3)
    if jax.default_backend() == "gpu":
        busy = busy_ms(lambda: call(*data[0]))
        row |= dict(busy_ms=busy, wall_over_busy=row["ms"] / busy)
    yield row


def busy_ms(call, calls=4):
    """The time that kernels and copies run on the GPU's streams in one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                out = call()
            jax.block_until_ready(out)
        trace = jax.profiler.ProfileData.from_file(sorted(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True))[-1])
    lines = [line for plane in trace.planes if "GPU" in plane.name for line in plane.lines]
    events = [event for line in lines if line.name.startswith("Stream") for event in line.events]
    return sum(event.duration_ns for event in events) / calls / 1e6


def workload(name, way, tiny):
    B, size, classes, build = WORKLOADS[name]
    B, size = (2, 32) if tiny else (B, size)
    options = dict(memory="fast") if way == "relu" else dict(implementation="scan" if way == "scan" else None)
    model = build(in_features=3, classes=classes, policy="bfloat16", rngs=nnx.Rngs(0), **options)
    model = with_relu(model) if way == "relu" else model
    way = "compiled_step" if way in ("scan", "relu") else way
    over_time = lambda images, _: jnp.broadcast_to(images, (T, *images.shape)).astype(jnp.bfloat16)
    step = step_of(lambda outs: outs.mean(0), prepare=over_time)
    keys = jax.random.split(jax.random.key(0), 4)
    batches = [(jax.random.normal(key, (B, size, size, 3)), jnp.arange(B) % classes) for key in keys]
    objects = with_adam(model, JOINED if way == "joined" else ADAM)
    yield from timed(bind(way, step, objects), batches, B)


def by_spikingjelly(name, way, tiny):
    import libraries
    import with_torch

    version = libraries.spikingjelly().version  # this call says which kernels run
    B, size, classes, _ = WORKLOADS[name]
    step = with_torch.zoo_step(name, way, T, *((2, 32) if tiny else (B, size)), classes)
    step()
    with_torch.sync()
    yield
    row = with_torch.measure(step, [()], no_graph="" if "graph" in way else "called as its users call it")
    yield row | dict(samples_per_s=B / row["ms"] * 1e3, version=version)


def small(name, way, steps, tiny):
    """A network of linear layers and LIF neurons, on spikes or on images that become spikes in the step."""
    T, B, widths = SMALL[name]
    T, B = (2, 4) if tiny else (T, B)
    rngs = nnx.Rngs(0)
    pairs = [(nnx.Linear(n, m, rngs=rngs), nn.LIF(tau=2.0)) for n, m in itertools.pairwise(widths)]
    objects = with_adam(nn.Sequential(*[*itertools.chain(*pairs)][:-1], nn.LI(tau=2.0)))
    rng, train = np.random.default_rng(0), step_of()
    if way == "DeviceData":
        images = rng.integers(0, 256, (40 * B, widths[0]), dtype=np.uint8)
        data = training.DeviceData((images, rng.integers(0, widths[-1], 40 * B)), B)

        def step(model, optimizer, data):
            (images, labels), key = data.next()
            xs = jax.random.bernoulli(key, images / jnp.float32(255), (T, *images.shape)).astype(jnp.float32)
            return train(model, optimizer, xs, labels)

        call = functools.partial(training.compiled_step(step).scan, *objects, data, steps=steps)
        yield from timed(call, [()], steps * B)
        return
    first = (steps,) if steps > 1 else ()
    xs = jnp.asarray(rng.random((*first, T, B, widths[0])) < 0.1, jnp.float32)
    labels = jnp.asarray(rng.integers(0, widths[-1], (*first, B)))
    call = functools.partial(training.compiled_step(train).scan, *objects) if steps > 1 else bind(way, train, objects)
    yield from timed(call, [(xs, labels)], steps * B)


@question(
    "resnet",
    kinds=("pallas,pallas_lean,pallas_fast,scan,relu", "implementation_memory, or relu"),
    dtypes=("bfloat16,tf32", "of the convolutions"),
    shapes=("28", f"of {', '.join(IMAGES)}"),
    depths=("18", "18, 34, 50"),
    T=("32", "time steps"),
)
def resnets(args):
    kinds, steps = ("scan,relu", "2") if args.tiny else (args.kinds, args.T)
    options = split(args.shapes), split(args.depths, int), split(args.dtypes), split(steps, int), split(kinds)
    for shape, depth, dtype, T, kind in itertools.product(*options):
        B, size = (2, 16) if args.tiny else IMAGES[shape]
        implementation, _, memory = kind.partition("_")
        memory = None if kind == "relu" else memory or "packed"
        key = dict(case=f"spiking-resnet-{depth}", implementation=implementation, memory=memory, dtype=dtype)
        key |= dict(T=T, B=B, size=size, input="random input")
        yield Case(key, spiking_resnet, (implementation, depth, dtype, memory, T, B, size), job(args))


def spiking_resnet(implementation, depth, dtype, memory, T, B, size):
    step = training_step(resnet(implementation, depth, dtype, memory))
    yield from compile_then_time(step, batches(T, B, size))


if __name__ == "__main__":
    main(__doc__, "step_calls", "resnet")
