"""How long does a training step of a spiking ResNet take, how much memory does it need, and where does the time go?

    python benchmarks/resnet.py                        Spiking-ResNet-18, T=32, B=100, 3 x 28 x 28; minutes on an H100
    python benchmarks/resnet.py --kinds pallas,relu --dtypes bfloat16 --shapes 28,32,dvs --depths 18,34,50
    python benchmarks/resnet.py resnet_profile         the share of each kind of kernel in the time that the GPU works
    python benchmarks/resnet.py without_gpu --T 3200   the memory on an H100, found by compiling, without a GPU

A step is forward, backward and Adam, on random spikes of rate 0.5 of the real shape; 8 different batches in turn. Kind
"relu" is our network with ReLU in place of the neurons; "flax_relu" is a ResNet of Flax's own layers, as a JAX user would
write it. `peak_mb` is what the program of the step holds: parameters, optimizer, batch and temporary arrays. Rows go to the
file in results/ that has the name of the question.

`without_gpu` needs JAX's CUDA plugin but no driver: `pip install --target FOLDER --no-deps jax-cuda12-plugin==$JAX
jax-cuda12-pjrt==$JAX nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 nvidia-cudnn-cu12 nvidia-cublas-cu12
nvidia-cuda-cupti-cu12 nvidia-nvjitlink-cu12 nvidia-cusparse-cu12 nvidia-cusolver-cu12 nvidia-cufft-cu12 nvidia-nccl-cu12`
with the installed version of JAX (4.5 GB), and FOLDER on PYTHONPATH. Nothing is tuned on a device, so the workspace of the
convolutions is missing: at T = 32, B = 100 the number equals a real H100's to some kB, with memory="lean" it is 6 % lower.
"""

import collections
import glob
import os
import re
import sys
import tempfile

if "without_gpu" in sys.argv:
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # otherwise the plugin asks a driver

import jax
import jax.numpy as jnp
from jax._src import xla_bridge
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from runner import Case, main, question, split
from with_jax import batches, compiled, resnet, time_step, training_step

SHAPES = {"28": (100, 28), "32": (100, 32), "dvs": (10, 128)}  # B, H = W
OPTIONS = dict(
    kinds=("pallas,pallas_lean,pallas_fast,scan,relu,flax_relu", "implementation_memory, relu or flax_relu"),
    dtypes=("bfloat16,tf32", "of the convolutions"),
    shapes=("28", f"of {', '.join(SHAPES)}"),
    depths=("18", "18, 34, 50"),
    T=("32", "time steps"),
)


def cases(args, measure, kinds):
    for shape in split(args.shapes):
        B, size = (2, 16) if args.tiny else SHAPES[shape]
        for depth in split(args.depths, int):
            for dtype in split(args.dtypes):
                for T in [2] if args.tiny else split(args.T, int):
                    for kind in split(kinds):
                        kind, _, memory = (kind, "", None) if "relu" in kind else kind.partition("_")
                        memory = "packed" if memory == "" else memory
                        key = dict(case=f"spiking-resnet-{depth}", implementation=kind, memory=memory, dtype=dtype)
                        yield Case(key | dict(T=T, B=B, size=size), measure, (kind, depth, dtype, memory, T, B, size))


def step_time(kind, depth, dtype, memory, T, B, size):
    step, leaves = training_step(resnet(kind, depth, dtype, memory))
    data = list(batches(T, B, size))
    program, row = compiled(step, leaves, *data[0])
    return row | time_step(program, leaves, data) | dict(input="random input")


KERNELS = {  # kinds of kernels, by name
    "convolution": r"cutlass|xmma|cudnn|gemm|nvjet|cask|Padding|conv",
    "neuron": r"snn_|mosaic|^fwd|^bwd",
    "max-pool": r"reduce_window|select_and_scatter|scatter",
    "copies": r"(?i)memcpy|memset",
    "reductions": r"reduce",
}


def profile(kind, depth, dtype, memory, T, B, size, steps=5):
    """Milliseconds that the GPU works in a step, the share of each kind of kernel, and the longest kernels."""
    step, leaves = training_step(resnet(kind, depth, dtype, memory))
    data = list(batches(T, B, size))
    time_step(step, [jnp.copy(leaf) for leaf in leaves], data)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(steps):
                leaves, metrics = step(leaves, *data[i])
            metrics["loss"].block_until_ready()
        trace = jax.profiler.ProfileData.from_file(sorted(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True))[-1])
    spent, count = collections.Counter(), collections.Counter()
    for plane in trace.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                spent[event.name] += event.duration_ns / steps / 1e3
                count[event.name] += 1 / steps
    kinds = collections.Counter()
    for name, us in spent.items():
        kinds[next((kind for kind, pattern in KERNELS.items() if re.search(pattern, name)), "pointwise")] += us
    return dict(
        busy_ms=sum(spent.values()) / 1e3,
        kernels=sum(count.values()),
        share={kind: us / sum(spent.values()) for kind, us in kinds.most_common()},
        longest=[(us, count[name], name[:100]) for name, us in spent.most_common(20)],
    )


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


def memory_without_gpu(kind, depth, dtype, memory, T, B, size):
    known = xla_bridge.canonicalize_platform  # it refuses "gpu" here: https://github.com/jax-ml/jax/issues/23971
    xla_bridge.canonicalize_platform = lambda platform: "cuda" if platform in ("gpu", "cuda") else known(platform)
    step, leaves = training_step(resnet(kind, depth, dtype, memory))
    device = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]
    shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(device))
    args = [shape(x.shape, x.dtype) for x in leaves], shape((T, B, size, size, 3), jnp.bool_), shape((B,), jnp.int32)
    abstract = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract)):
        return compiled(step, *args)[1] | dict(target="NVIDIA H100 80GB HBM3")


question("resnet", **OPTIONS)(lambda args: cases(args, step_time, "scan,relu,flax_relu" if args.tiny else args.kinds))
question("resnet_profile", **OPTIONS)(lambda args: cases(args, profile, args.kinds))
question("without_gpu", gpu=False, **OPTIONS)(
    lambda args: cases(args, memory_without_gpu, "pallas,pallas_lean,pallas_fast")
)

if __name__ == "__main__":
    main(__doc__, "resnet", "resnet_profile", "without_gpu")
