"""A training step of benchmarks/resnet.py compiled for an H100 where there is none: the memory that it will need.

    python benchmarks/without_gpu.py [--memory packed,lean,fast] [--depths 18] [--T 32,1024] [--hlo FOLDER]

It needs JAX's CUDA plugin, but no driver (4.5 GB; JAX=0.11.2, or what is installed; FOLDER then goes on PYTHONPATH):
`pip install --target FOLDER --no-deps jax-cuda12-plugin==$JAX jax-cuda12-pjrt==$JAX nvidia-cuda-nvcc-cu12
nvidia-cuda-runtime-cu12 nvidia-cudnn-cu12 nvidia-cublas-cu12 nvidia-cuda-cupti-cu12 nvidia-nvjitlink-cu12
nvidia-cusparse-cu12 nvidia-cusolver-cu12 nvidia-cufft-cu12 nvidia-nccl-cu12`.

Rows go to results/without_gpu.jsonl, and are no measurements: nothing is tuned on a device, so that no workspace of a
convolution is in them. Of T = 32, B = 100 the packed network's is that of an H100 (results/resnet.jsonl) to some kB, the
lean one's 6 % less: what is tuned there packs worse.
"""

import argparse
import os
import time
from pathlib import Path

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # else the plugin asks a driver

import jax
import jax.numpy as jnp
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from measure import peak_mb, record
from resnet import build, training

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 15 } runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compiled(case, depth, precision, T, B, size):
    step, leaves = training(build(case, depth, precision))
    device = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]
    shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(device))
    args = [shape(x.shape, x.dtype) for x in leaves], shape((T, B, size, size, 3), jnp.bool_), shape((B,), jnp.int32)
    abstract = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract)):
        return step.lower(*args).compile()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="packed,lean,fast")
    parser.add_argument("--depths", default="18")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--T", default="32")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--hlo", type=Path, help="a folder for the compiled programs")
    args = parser.parse_args()
    known = xla_bridge.canonicalize_platform  # without a GPU "gpu" is none: https://github.com/jax-ml/jax/issues/23971
    xla_bridge.canonicalize_platform = lambda platform: "cuda" if platform in ("gpu", "cuda") else known(platform)
    for depth in map(int, args.depths.split(",")):
        for T in map(int, args.T.split(",")):
            for memory in args.memory.split(","):
                start = time.perf_counter()
                program = compiled(f"pallas_{memory}", depth, args.precision, T, args.batch, args.size)
                row = dict(case=f"spiking-resnet-{depth}", memory=memory, precision=args.precision, T=T, B=args.batch)
                row |= dict(size=args.size, peak_mb=peak_mb(program), compile_s=time.perf_counter() - start)
                record("without_gpu", **row, target="NVIDIA H100 80GB HBM3", status="ok")
                if args.hlo:
                    args.hlo.mkdir(parents=True, exist_ok=True)
                    (args.hlo / f"resnet{depth}_{memory}_T{T}.hlo").write_text(program.as_text())


if __name__ == "__main__":
    main()
