"""Several devices: meshes and hosts, data parallel steps, time over devices, and a model of what they cost.

Lanes do not depend on each other. So `jit` of `snnfuse.unroll` on arrays with a NamedSharding runs each device's lanes on
that device. A whole training step can use two axes; each is optional:

    mesh = make_mesh("data=2,time=4")
    synchronise_batch_norm(model, ("data", "time"))       # normalise by the whole batch, as on one device
    over_time(model)                                      # each device runs a part of the time steps
    step = jax.jit(data_parallel(step, mesh, batch=(P("time", "data"), P("data"))))      # xs [T, B, ...], labels [B]

Write the step for one device, and average its gradients: `grads = mean_gradients(grads)`. Along time, also read the
outputs by `readout(nn.spike_rate, outs)`. An optimizer in `flatten_optimizer` starts with the gradients that are known
first. `initialise`, `host_rows` and `global_batch` are for several hosts. `plan_meshes(layers, T, batch, devices)` ranks
meshes by their predicted time.
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
