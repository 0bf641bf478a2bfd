"""Many devices: meshes and hosts, data parallel steps, time as a pipeline, and what each of them will cost."""

from snnfuse.parallel.mesh import global_batch, initialise, make_mesh, my_part, shard
from snnfuse.parallel.plan import Layer, Machine, Plan, best_devices, plan, simulate
from snnfuse.parallel.step import data_parallel, fold, mean, pmapped, synchronise_batch_norm
from snnfuse.parallel.time import OverTime, over_time, readout, unroll_over_time

__all__ = [
    "Layer",
    "Machine",
    "OverTime",
    "Plan",
    "best_devices",
    "data_parallel",
    "fold",
    "global_batch",
    "initialise",
    "make_mesh",
    "mean",
    "my_part",
    "over_time",
    "plan",
    "pmapped",
    "readout",
    "shard",
    "simulate",
    "synchronise_batch_norm",
    "unroll_over_time",
]
