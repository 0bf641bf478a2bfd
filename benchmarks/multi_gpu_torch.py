"""SpikingJelly's Spiking-ResNet-18 with DistributedDataParallel, beside the data parallel rows of benchmarks/multi_gpu.py.

    python benchmarks/multi_gpu_torch.py [--devices 1,2,4,8] [--dtypes tf32,bfloat16]       rows go to results/multi_gpu.jsonl

A process a GPU over NCCL; the network and its calls are those of benchmarks/peers.py. `ms` is the slowest process's.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed, multiprocessing

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def worker(rank, devices, dtype, B, size, pipe):
    from adapters import spikingjelly, torch_resnet

    cuda = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    distributed.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=devices)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    T = 32 if cuda else 2
    parallel = torch.nn.parallel.DistributedDataParallel
    wrap = lambda net: parallel(net, device_ids=[rank] if cuda else None, gradient_as_bucket_view=True)
    step, xs, labels = torch_resnet.training(spikingjelly, "triton", dtype, T, B // devices, size, device, wrap=wrap)
    sync = torch.cuda.synchronize if cuda else lambda: None
    losses = [float(step(xs, labels)) for _ in range(4)]
    if cuda:  # the first steps try algorithms
        torch.cuda.reset_peak_memory_stats()
    samples = []
    for _ in range(7):
        distributed.barrier()
        sync()
        start = time.perf_counter()
        for _ in range(8 if cuda else 1):
            step(xs, labels)
        sync()
        samples.append((time.perf_counter() - start) / (8 if cuda else 1) * 1e3)
    quartiles = torch.quantile(torch.tensor(samples, device=device), torch.tensor([0.5, 0.25, 0.75], device=device))
    distributed.all_reduce(quartiles, distributed.ReduceOp.MAX)
    if rank == 0:
        ms, *rest = quartiles.tolist()
        peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else None
        pipe.put(dict(T=T, ms=ms, quartiles=rest, samples_per_s=B / ms * 1e3, peak_mb=peak, losses=losses))
    distributed.destroy_process_group()


def measured(devices, dtype, B, size):
    context = multiprocessing.get_context("spawn")
    pipe = context.SimpleQueue()
    multiprocessing.spawn(worker, (devices, dtype, B, size, pipe), nprocs=devices)
    return pipe.get()


def main():
    from peers import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="1,2,4,8", help="counts to measure, of those that there are")
    parser.add_argument("--dtypes", default="tf32,bfloat16")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    counts = [n for n in map(int, args.devices.split(",")) if n <= (torch.cuda.device_count() if cuda else 2)]
    where = torch.cuda.get_device_name() if cuda else "cpu"
    for dtype in args.dtypes.split(","):
        for n in counts:
            B = 100 * n if cuda else 4
            row = dict(case="resnet18", library="spikingjelly", how="DDP", dtype=dtype, devices=n, batch=B)
            row |= dict(mesh={"data": n}, device=where, torch=torch.__version__)
            try:
                row |= measured(n, dtype, B, 28 if cuda else 16)
            except Exception as e:
                row |= dict(status=f"failed: {str(e).splitlines()[-1][:200]}")
            record(HERE / "results/multi_gpu.jsonl", row)


if __name__ == "__main__":
    main()
