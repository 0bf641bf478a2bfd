"""A training step of spiking ResNets: time, peak memory and a profile, beside `lax.scan` and networks of ReLU.

    python benchmarks/resnet.py                            Spiking-ResNet-18, T=32, B=100, 3 x 28 x 28; minutes on an H100
    python benchmarks/resnet.py --cases pallas,relu --precisions bfloat16 --shapes 28,32,dvs --depths 18,34,50

Rows go to results/resnet.jsonl. Input is random spikes of rate 0.5 of the real shape ("random input"), 8 different batches
in turn; a step is forward, backward and Adam. `relu` is our network with ReLU in place of the neurons, `flax_relu` the
same of flax's own layers, as a JAX user would write a ResNet. `peak_mb` is what the step's program holds: parameters,
optimizer, batch and temporaries. The shares of a profile are of the time in which the GPU works.
"""

import argparse
import collections
import glob
import re
import tempfile
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from measure import RESULTS, peak_mb, record

from snnfuse import models, nn
from snnfuse.models.resnet import DEPTHS

SHAPES = {"28": (100, 28), "32": (100, 32), "dvs": (10, 128), "tiny": (2, 16)}  # B, H = W


class NormReLU(nn.Temporal):
    """`nn.NormSpiking` with ReLU for a neuron."""

    def __init__(self, layer):
        self.norm, self.shortcut_norm = layer.norm, layer.shortcut_norm

    def __call__(self, xs, state=None, shortcut=None):
        scale, shift = self.norm.affine(xs)
        current = xs.astype(jnp.float32) * scale + shift
        if shortcut is not None:
            scale, shift = (1.0, 0.0) if self.shortcut_norm is None else self.shortcut_norm.affine(shortcut)
            current = current + shortcut.astype(jnp.float32) * scale + shift
        return jax.nn.relu(current).astype(xs.dtype), ()


def relu(depth, precision):
    """Our network, its neurons replaced."""
    model = models.spiking_resnet(depth, 3, 10, policy=precision, rngs=nnx.Rngs(0))
    model.layers = nnx.List([layer for layer in model.layers if not isinstance(layer, nn.PackSpikes)])
    for _, module in list(nnx.iter_modules(model)):
        for name, child in list(vars(module).items()):
            if isinstance(child, nn.NormSpiking):
                setattr(module, name, NormReLU(child))
        if isinstance(module, nn.Sequential):
            module.layers = nnx.List([NormReLU(x) if isinstance(x, nn.NormSpiking) else x for x in module.layers])
    return model


class FlaxBlock(nnx.Module):
    def __init__(self, features, width, stride, dtype, rngs):
        conv = partial(nnx.Conv, use_bias=False, dtype=dtype, rngs=rngs)
        norm = partial(nnx.BatchNorm, dtype=dtype, rngs=rngs)
        self.conv1, self.norm1 = conv(features, width, (3, 3), strides=stride, padding=1), norm(width)
        self.conv2, self.norm2 = conv(width, width, (3, 3), padding=1), norm(width)
        same = features == width and stride == 1
        self.down = None if same else conv(features, width, (1, 1), strides=stride)
        self.norm3 = None if same else norm(width)

    def __call__(self, x):
        beside = x if self.down is None else self.norm3(self.down(x))
        return jax.nn.relu(self.norm2(self.conv2(jax.nn.relu(self.norm1(self.conv1(x))))) + beside)


class FlaxResNet(nnx.Module):
    def __init__(self, depth, precision):
        dtype, rngs = nn.PrecisionPolicy(precision).dtype, nnx.Rngs(0)
        self.conv = nnx.Conv(3, 64, (7, 7), strides=2, padding=3, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(64, dtype=dtype, rngs=rngs)
        blocks, features = [], 64
        for stage, count in enumerate(DEPTHS[depth]):
            for i in range(count):
                blocks.append(FlaxBlock(features, 64 * 2**stage, 2 if stage and not i else 1, dtype, rngs))
                features = 64 * 2**stage
        self.blocks, self.classify = nnx.List(blocks), nnx.Linear(features, 10, rngs=rngs)

    def __call__(self, xs):
        x = jax.nn.relu(self.norm(self.conv(xs.reshape(-1, *xs.shape[2:]))))
        x = nnx.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for block in self.blocks:
            x = block(x)
        return self.classify(x.mean((1, 2), dtype=jnp.float32)).reshape(*xs.shape[:2], -1), ()


def build(case, depth, precision):
    if case == "flax_relu" and depth >= 50:
        raise NotImplementedError("flax_relu has basic blocks alone, depth 18 and 34")
    if case == "flax_relu":
        return FlaxResNet(depth, precision)
    if case == "relu":
        return relu(depth, precision)
    implementation, memory = named(case)
    options = dict(memory=memory, implementation=implementation, rngs=nnx.Rngs(0))
    return models.spiking_resnet(depth, 3, 10, policy=precision, **options)


def named(case):
    """(implementation, memory) of a case such as pallas_lean."""
    implementation, _, memory = case.partition("_")
    return implementation, memory or "packed"


def training(model):
    """(step, state): a jitted step(state, xs, labels) -> (state, loss) that donates its state."""
    model.train()
    graphdef, state = nnx.split((model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)))
    leaves, tree = jax.tree.flatten(state)  # a list, which dispatch takes apart faster than nnx.State

    @partial(jax.jit, donate_argnums=0)
    def step(leaves, xs, labels):
        model, optimizer = nnx.merge(graphdef, tree.unflatten(leaves))

        def loss_of(model):
            logits = nn.membrane_mean(model(xs)[0])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return jax.tree.leaves(nnx.state((model, optimizer))), loss

    return step, leaves


def batches(T, B, size, count=8):
    for i in range(count):
        key, label = jax.random.split(jax.random.key(i))
        yield jax.random.bernoulli(key, 0.5, (T, B, size, size, 3)), jax.random.randint(label, (B,), 0, 10)


def timed(step, state, data, seconds=0.5):
    """(milliseconds of a step: median and quartiles; the first losses; the last state)"""
    losses = []
    for i in range(6):
        state, loss = step(state, *data[i % len(data)])
        losses.append(float(loss))
    start = time.perf_counter()
    state, loss = step(state, *data[0])
    loss.block_until_ready()
    calls = max(3, int(seconds / 7 / (time.perf_counter() - start)))
    calls = int(multihost_utils.broadcast_one_to_all(calls))  # processes that step together make as many
    samples = []
    for _ in range(7):
        start = time.perf_counter()
        for i in range(calls):
            state, loss = step(state, *data[i % len(data)])
        loss.block_until_ready()
        samples.append((time.perf_counter() - start) / calls * 1e3)
    return tuple(float(q) for q in np.quantile(samples, (0.5, 0.25, 0.75))), losses, state


KINDS = {  # of kernels in a profile, by name
    "convolution": r"cutlass|xmma|cudnn|gemm|nvjet|cask|Padding|conv",
    "neuron": r"snn_|mosaic|^fwd|^bwd",
    "max-pool": r"reduce_window|select_and_scatter|scatter",
    "copies": r"(?i)memcpy|memset",
    "reductions": r"reduce",
}


def profile(step, state, data, steps=5):
    """{kind of kernel: its share of the busy time}, busy milliseconds and kernels a step, and the longest of them."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(steps):
                state, loss = step(state, *data[i])
            loss.block_until_ready()
        trace = jax.profiler.ProfileData.from_file(sorted(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True))[-1])
    spent, count = collections.Counter(), collections.Counter()
    for plane in trace.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                spent[event.name] += event.duration_ns / steps / 1e3
                count[event.name] += 1 / steps
    kinds = collections.Counter()
    for name, us in spent.items():
        kinds[next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "pointwise")] += us
    busy = sum(spent.values())
    return dict(
        busy_ms=busy / 1e3,
        kernels=sum(count.values()),
        share={kind: round(us / busy, 4) for kind, us in kinds.most_common()},
        longest=[(round(us, 1), round(count[name], 1), name[:100]) for name, us in spent.most_common(20)],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="pallas,pallas_lean,pallas_fast,scan,relu,flax_relu")
    parser.add_argument("--precisions", default="bfloat16,tf32")
    parser.add_argument("--shapes", default="28")
    parser.add_argument("--depths", default="18")
    parser.add_argument("--T", type=int, default=32)
    parser.add_argument("--profile", action="store_true", help="a row of where the time of a step goes, too")
    args = parser.parse_args()
    for shape in args.shapes.split(","):
        B, size = SHAPES[shape]
        data = list(batches(args.T, B, size))
        for depth in map(int, args.depths.split(",")):
            for precision in args.precisions.split(","):
                for case in args.cases.split(","):
                    implementation, memory = (case, None) if "relu" in case else named(case)
                    row = dict(case=f"spiking-resnet-{depth}", implementation=implementation, memory=memory)
                    row |= dict(precision=precision, T=args.T, B=B, size=size)
                    try:
                        measure(row, case, depth, precision, data, args.profile)
                    except Exception as e:  # a failure is a row
                        record("resnet", **row, status=repr(e)[:300])


def measure(row, case, depth, precision, data, with_profile):
    step, state = training(build(case, depth, precision))
    start = time.perf_counter()
    compiled = step.lower(state, *data[0]).compile()
    compile_s = time.perf_counter() - start
    (ms, low, high), losses, state = timed(step, state, data)
    record(
        "resnet",
        **row,
        input="random input",
        ms=ms,
        quartiles=(low, high),
        peak_mb=peak_mb(compiled),
        compile_s=compile_s,
        losses=[round(loss, 4) for loss in losses],
        status="ok",
    )
    if with_profile:
        record("resnet_profile", **row, **profile(step, state, data), status="ok")


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    main()
