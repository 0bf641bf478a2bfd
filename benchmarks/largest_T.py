"""The longest sequence whose training step fits on the device: Spiking-ResNet-18, B=100, 3 x 28 x 28, Adam.

    XLA_PYTHON_CLIENT_MEM_FRACTION=.95 python benchmarks/largest_T.py --T 4704,4608,4512                  kept as bits
    XLA_PYTHON_CLIENT_MEM_FRACTION=.95 python benchmarks/largest_T.py --how lean --T 9408,9216
    python benchmarks/largest_T.py --library spikingjelly --how triton --dtype bfloat16 --T 1600,1536

The lengths are tried in their order, up to the first that fits; each is a row of results/largest_T.jsonl, with the time
of a step, too. Input is random spikes. A length that needs more than there is says what the error said.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def ours(how, dtype, T, B, size):
    import jax
    from measure import peak_mb
    from resnet import batches, build, training

    step, state = training(build(f"pallas_{how}", 18, dtype))
    data = next(iter(batches(T, B, size)))
    start = time.perf_counter()
    compiled = step.lower(state, *data).compile()
    row = dict(peak_mb=peak_mb(compiled), compile_s=time.perf_counter() - start)
    losses, ends = [], []
    for _ in range(4):
        state, loss = compiled(state, *data)
        losses.append(float(loss))
        ends.append(time.perf_counter())
    return row | dict(losses=losses, ms=(ends[-1] - ends[0]) / 3 * 1e3, jax=jax.__version__)


def theirs(how, dtype, T, B, size):
    import torch
    from adapters import spikingjelly, torch_resnet

    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    step, xs, labels = torch_resnet.training(spikingjelly, how, dtype, T, B, size, on)
    losses, ends = [], []
    for _ in range(4):
        losses.append(float(step(xs, labels)))
        ends.append(time.perf_counter())
    peak = torch.cuda.max_memory_allocated() / 1e6 if on.type == "cuda" else None
    return dict(losses=losses, ms=(ends[-1] - ends[0]) / 3 * 1e3, peak_mb=peak, torch=torch.__version__)


def device():
    if "torch" in sys.modules:
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    import jax

    return jax.devices()[0].device_kind


def attempt(args, T):
    """A row; of a length that does not fit, with the reason. A process of its own gives back what it took."""
    row = dict(case="spiking-resnet-18", library=args.library, how=args.how, dtype=args.dtype, T=T, B=args.batch)
    row |= dict(size=args.size)
    try:
        run = ours if args.library == "snnfuse" else theirs
        row |= run(args.how, args.dtype, T, args.batch, args.size)
    except Exception as e:
        row |= dict(status=f"{type(e).__name__}: {str(e)[:200]}")
    return row | dict(device=device())


def main():
    from peers import CONTEXT, record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", default="snnfuse", choices=("snnfuse", "spikingjelly"))
    parser.add_argument("--how", default="packed", help="memory of ours, or the way of SpikingJelly (adapters/)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--T", required=True)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--size", type=int, default=28)
    args = parser.parse_args()
    for T in map(int, args.T.split(",")):
        with ProcessPoolExecutor(1, CONTEXT) as own:
            row = own.submit(attempt, args, T).result()
        record(HERE / "results/largest_T.jsonl", row)
        if row.get("status", "ok") == "ok":
            return


if __name__ == "__main__":
    main()
