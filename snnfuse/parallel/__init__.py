"""Many devices: meshes and hosts, data parallel steps, time over devices, and what each of them will cost.

Lanes split by themselves: `jit` of `snnfuse.unroll` on arrays with a NamedSharding runs on every device's own lanes.
For a whole train step there are two axes, each optional:

    mesh = make_mesh("data=2,time=4")
    synchronise_batch_norm(model, ("data", "time"))       # statistics of the whole batch, as on one device
    over_time(model)                                      # a device's neurons start where those before it end
    step = jax.jit(data_parallel(step, mesh, batch=(P("time", "data"), P("data"))))      # xs [T, B, ...], labels [B]

The step is that of one device, but for `grads = mean_gradients(grads)` and, along time, `readout(nn.spike_rate, outs)` for the
outputs. An optimizer in `flatten_optimizer` begins with the gradients that are known first. `initialise`, `host_rows` and
`global_batch` are for several hosts. `plan_meshes(layers, T, batch, devices)` ranks meshes.
"""

from snnfuse.parallel.mesh import global_batch, host_rows, initialise, make_mesh, shard
from snnfuse.parallel.plan import LayerCost, Machine, Plan, plan_meshes
from snnfuse.parallel.step import (
    data_parallel,
    flatten_optimizer,
    fold_key,
    mean_gradients,
    pmapped,
    synchronise_batch_norm,
)
from snnfuse.parallel.time import OverTime, over_time, readout, unroll_over_time

__all__ = [
    "LayerCost",
    "Machine",
    "OverTime",
    "Plan",
    "data_parallel",
    "flatten_optimizer",
    "fold_key",
    "global_batch",
    "initialise",
    "make_mesh",
    "mean_gradients",
    "host_rows",
    "over_time",
    "plan_meshes",
    "pmapped",
    "readout",
    "shard",
    "synchronise_batch_norm",
    "unroll_over_time",
]
