"""One host of a cluster, or a process alone, that trains the network of small_network.py; tests/test_parallel.py starts them.

python tests/on_two_hosts.py COORDINATOR HOST OUT data=4      one of two hosts, each with 2 of 4 simulated devices
python tests/on_two_hosts.py - - OUT data=8                   alone; from the checkpoint in OUT, if there is one
"""

import json
import sys
from functools import partial
from pathlib import Path

import faster  # noqa: F401
import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from small_network import images, network, train_step

from snnfuse import nn, parallel

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

from checkpoints import Checkpoints


def flat(state):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def main(coordinator, host, out, axes):
    if coordinator != "-":
        parallel.initialise(coordinator, 2, int(host))
    hosts = jax.process_count()
    assert hosts == (1 if coordinator == "-" else 2)
    mesh = parallel.make_mesh(axes)
    specs = P(None, "data"), P("data")
    graphdef, state = network("data")
    state = parallel.shard(state, mesh)
    step = jax.jit(parallel.data_parallel(partial(train_step, graphdef, nn.membrane_mean), mesh, batch=specs))

    xs, labels = map(np.asarray, images())
    mine = parallel.host_rows(len(labels))  # a host loads its own samples and no others
    batch = parallel.global_batch(xs[:, mine], mesh, specs[0]), parallel.global_batch(labels[mine], mesh, specs[1])
    assert batch[0].shape == xs.shape and len({s.device for s in batch[0].addressable_shards}) == mesh.size // hosts

    checkpoints = Checkpoints(Path(out) / "checkpoints")
    first, losses = 0, []
    if (found := checkpoints.restore(flat(state))) is not None:
        first = found[0]
        state = jax.tree_util.tree_map_with_path(lambda path, _: found[1][jax.tree_util.keystr(path)], state)
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state)), "restored onto the mesh of now"
    for k in range(first, 4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        if k + 1 == 2:
            checkpoints.save(2, flat(state))
            assert checkpoints.last() == 2
    checkpoints.close()
    if jax.process_index() == 0:
        (Path(out) / f"losses-{axes}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
