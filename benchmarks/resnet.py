"""How long does a training step of a spiking ResNet take, and how much memory does it need?

    python benchmarks/resnet.py                        Spiking-ResNet-18, T=32, B=100, 3 x 28 x 28; minutes on an H100
    python benchmarks/resnet.py --kinds pallas,relu --dtypes bfloat16 --shapes 28,32,dvs --depths 18,34,50

A step is forward, backward and Adam, on random spikes of rate 0.5, with 8 different batches in turn. Kind "relu" is our
network with ReLU in place of the neurons. `peak_mb` is what the program of the step holds: parameters, optimizer, batch and
temporary arrays. Rows go to results/resnet.jsonl.
"""

import itertools

from runner import Case, job, main, question, split
from with_jax import batches, compile_then_time, resnet, training_step

SHAPES = {"28": (100, 28), "32": (100, 32), "dvs": (10, 128)}  # B, H = W


@question(
    "resnet",
    kinds=("pallas,pallas_lean,pallas_fast,scan,relu", "implementation_memory, or relu"),
    dtypes=("bfloat16,tf32", "of the convolutions"),
    shapes=("28", f"of {', '.join(SHAPES)}"),
    depths=("18", "18, 34, 50"),
    T=("32", "time steps"),
)
def cases(args):
    kinds, steps = ("scan,relu", "2") if args.tiny else (args.kinds, args.T)
    options = split(args.shapes), split(args.depths, int), split(args.dtypes), split(steps, int), split(kinds)
    for shape, depth, dtype, T, kind in itertools.product(*options):
        B, size = (2, 16) if args.tiny else SHAPES[shape]
        implementation, _, memory = kind.partition("_")
        memory = None if kind == "relu" else memory or "packed"
        key = dict(case=f"spiking-resnet-{depth}", implementation=implementation, memory=memory, dtype=dtype)
        key |= dict(T=T, B=B, size=size, input="random input")
        yield Case(key, measure, (implementation, depth, dtype, memory, T, B, size), job(args))


def measure(implementation, depth, dtype, memory, T, B, size):
    step = training_step(resnet(implementation, depth, dtype, memory))
    yield from compile_then_time(step, list(batches(T, B, size)))


if __name__ == "__main__":
    main(__doc__, "resnet")
