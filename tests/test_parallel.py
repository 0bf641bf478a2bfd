"""Many devices: the tests of 8 simulated ones in a process of their own; meshes, plans and kernels under vmap in this one."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_close, assert_fires
from jax.sharding import PartitionSpec as P

import snnfuse as sf
from snnfuse import parallel
from snnfuse.parallel.plan import H100, LayerCost, all_reduce, hand_over, plan_meshes, predict, rounds

HERE = Path(__file__).parent


def on_devices(count):
    """The environment of a process with so many simulated devices. It keeps the flags that conftest.py sets."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def test_everything_on_8_devices():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(HERE / "on_8_devices.py")],
        env=on_devices(8),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout


def on_hosts(out, axes, devices, hosts=1):
    """Run tests/on_two_hosts.py on so many processes of so many simulated devices; the losses it wrote."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        coordinator = f"localhost:{s.getsockname()[1]}" if hosts > 1 else "-"
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "on_two_hosts.py"), coordinator, str(i) if hosts > 1 else "-", str(out), axes],
            env=on_devices(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(hosts)
    ]
    try:
        outputs = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(o[-3000:] for o in outputs)
    return json.loads((out / f"losses-{axes}.json").read_text())


def test_two_hosts_train_as_one_and_their_checkpoint_goes_on_elsewhere(tmp_path):
    """Two processes of two devices, each with its half of the batch; then its checkpoint of step 2 on one of eight."""
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    two = on_hosts(tmp_path / "two", "data=4", devices=2, hosts=2)
    elsewhere = on_hosts(tmp_path / "two", "data=8", devices=8)
    one = on_hosts(tmp_path / "one", "data=1", devices=1)
    assert one[-1] < one[0] and len(one) == 4
    np.testing.assert_allclose(two, one, rtol=1e-5)
    np.testing.assert_allclose(elsewhere, one[2:], rtol=1e-5)


# ---- kernels under vmap: their rule is ours


@pytest.mark.parametrize("mapped", ["xs", "params", "all"])
def test_vmap_of_the_kernels(mapped):
    """Values and all gradients of a mapped `unroll` equal those of its parts, for each choice of mapped arguments."""
    case = cases.make("affine", T=5, lanes=(3, 8))
    stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 1.1 * x]), tree)
    args = [stack(a) if mapped in (n, "all") else a for n, a in zip(("params", "state", "xs"), case[1:4], strict=True)]
    axes = [0 if mapped in (n, "all") else None for n in ("params", "state", "xs")]

    def f(params, state, xs, implementation):
        out, vjp = jax.vjp(partial(sf.unroll, case.neuron, implementation=implementation), params, state, xs)
        return out, vjp(cases.cotangents(jax.eval_shape(lambda: out)))

    got = jax.jit(jax.vmap(partial(f, implementation="interpret"), axes))(*args)
    part = lambda i: [jax.tree.map(lambda x: x[i], a) if axis == 0 else a for a, axis in zip(args, axes, strict=True)]
    want = [jax.jit(partial(f, implementation="scan"))(*part(i)) for i in range(3)]
    assert_fires(want[0][0][0])
    assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *want), rtol=case.rtol)


# ---- one device is a mesh too


def test_outside_of_a_mesh_nothing_is_reduced_or_folded():
    key, tree = jax.random.key(0), {"a": jnp.arange(3.0)}
    assert parallel.mean_gradients(tree) is tree
    assert parallel.fold_key(key) is key


def test_gradients_travel_as_floats():
    with pytest.raises(ValueError, match="dtype must be one of floats; got int32"):
        parallel.mean_gradients({"a": jnp.arange(3.0)}, dtype=jnp.int32)


def test_a_flattened_optimizer_is_the_optimizer():
    """This also holds for mixed dtypes, and for a tree without leaves."""
    draw = lambda i, dtype: jax.random.normal(jax.random.key(i), (3, 2), dtype)
    params = {"a": draw(0, jnp.float32), "b": [draw(1, jnp.bfloat16), draw(2, jnp.float32)], "c": jnp.float32(1.0)}
    grads = jax.tree.map(lambda p: p * 3 - 1, params)
    plain, flat = optax.adam(1e-1), parallel.flatten_optimizer(optax.adam(1e-1))
    want, _ = plain.update(grads, plain.init(params))
    got, state = flat.update(grads, flat.init(params))
    assert jax.tree.structure(got) == jax.tree.structure(want) and len(jax.tree.leaves(state)) == 5
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)
    assert flat.update({}, flat.init({}))[0] == {}
    with pytest.raises(ValueError, match=r"grads must be of the dtypes of params, \['float32'\]; got \['bfloat16'\]"):
        flat.update({"a": jnp.ones(2, jnp.bfloat16)}, flat.init({"a": jnp.ones(2)}), {"a": jnp.ones(2)})


def test_meshes_by_name():
    mesh = parallel.make_mesh("data=1, time=1")
    assert dict(mesh.shape) == {"data": 1, "time": 1}
    for text in ("data", "data=", "data=0", "data=2x", "data=1,data=1", "", "data=-1", "2=data"):
        with pytest.raises(ValueError, match="mesh must"):
            parallel.make_mesh(text)
    with pytest.raises(ValueError, match=f"needs 4096 devices; there are {jax.device_count()}"):
        parallel.make_mesh({"data": 4096})
    with pytest.raises(ValueError, match="names the axis 'model'; the mesh has {'data': 1}"):
        parallel.shard(jnp.ones(4), parallel.make_mesh("data=1"), P("model"))
    with pytest.raises(ValueError, match="one of spike_rate, membrane_mean"):
        parallel.readout(jnp.mean, jnp.ones((2, 2, 2)))


def test_the_parts_of_hosts_make_the_batch():
    parts = [parallel.host_rows(12, hosts=3, host=i) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate([np.arange(12)[p] for p in parts]), np.arange(12))
    with pytest.raises(ValueError, match="multiple of the 5 hosts; got 12"):
        parallel.host_rows(12, hosts=5, host=0)


# ---- the cost model


def test_the_rounds_cost_what_their_sum_is():
    """Run by run and hand-over by hand-over; the least of it is at the square root, and near 2 units with many devices."""
    unit, hand = 1.0, 0.01
    for G in (2, 3, 8):
        forward = [1] * (G - 1) + [2]
        backward = [2] + [1] * (G - 2) + [3]
        seconds = sum(forward + backward) * unit / G + 2 * (G - 1) * hand
        assert rounds(G, unit, 0.0, hand) == pytest.approx(seconds)
        assert seconds == pytest.approx((2 * G + 4) * unit / G + 2 * (G - 1) * hand)
        assert rounds(G, 1e-9, 1.0, 0.0) == pytest.approx(2 * G), "the launches alone"
    assert rounds(1, unit, 0.0, hand) == 5 * unit
    assert rounds(10**6, unit, 0.0, 0.0) == pytest.approx(2 * unit, rel=1e-5)
    best = min(range(1, 100), key=lambda G: rounds(G, unit, 0.0, hand))
    assert abs(best - np.sqrt(2 * unit / hand)) <= 1


LAYERS = [LayerCost(50_000, 2e8, 40_000)] * 8


def test_predictions_behave():
    one = predict(LAYERS, 32, 64, 1, 1)
    assert one.gradients == one.statistics == 0 and one.devices == 1
    data, time = predict(LAYERS, 32, 64, 8, 1), predict(LAYERS, 32, 64, 1, 8)
    assert data.dense == pytest.approx(one.dense / 8) and time.dense == pytest.approx(one.dense / 8)
    assert data.neurons < time.neurons, "time takes rounds"
    assert data.gradients == time.gradients == all_reduce(4 * 8 * 40_000, 8, H100)
    assert time.bytes == pytest.approx(data.bytes), "time over devices divides the memory as data does"
    assert all_reduce(1e9, 1, H100) == 0 and all_reduce(1e9, 4096, H100) > all_reduce(1e9, 8, H100)
    assert hand_over(1e6, H100, 4096) > hand_over(1e6, H100, 8)


def test_the_model_gives_back_the_step_that_its_flop_rate_is_from():
    """A training step of Spiking-ResNet-18, 28x28, T = 32, batch 100, bfloat16, on an H100: 4.83 ms in a prototype."""
    widths = [(64, 7, 64)] + [(64, 7, 64)] * 3 + [(64, 4, 128)] + [(128, 4, 128)] * 3
    widths += [(128, 2, 256)] + [(256, 2, 256)] * 3 + [(256, 1, 512)] + [(512, 1, 512)] * 3
    layers = [LayerCost(64 * 14**2, 2 * 49 * 3 * 64 * 14**2, 49 * 3 * 64)]
    layers += [LayerCost(out * size**2, 2 * 9 * into * out * size**2, 9 * into * out) for into, size, out in widths]
    assert predict(layers, 32, 100, 1, 1).seconds == pytest.approx(4.83e-3, rel=0.1)


def test_plans_are_sorted_divide_and_fit():
    plans = plan_meshes(LAYERS, T=48, batch=20, devices=16)
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
    for p in plans:
        assert 20 % p.data == 48 % p.time == 0 and p.devices <= 16
    assert {p.devices for p in plan_meshes(LAYERS, T=48, batch=20, devices=16, exactly=True)} == {16}
    alone = plan_meshes(LAYERS, T=4096, batch=1, devices=64)
    assert alone[0].time > 1, "one sample can be split in time alone"
    with pytest.raises(ValueError, match="no mesh of 1 devices runs T=1000000"):
        plan_meshes(LAYERS, T=1_000_000, batch=64, devices=1)
    with pytest.raises(ValueError, match="at least 1"):
        plan_meshes(LAYERS, T=0, batch=1, devices=1)
