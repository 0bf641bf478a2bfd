"""Streaming inference: a network that takes a sequence as it arrives, and keeps its state between the calls."""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from snnfuse.core.neuron import PyTree
from snnfuse.nn.psn import PSN
from snnfuse.nn.tebn import TEBN
from snnfuse.nn.temporal import Temporal


class Stream:
    """A network compiled to take the next steps of a sequence: xs [K, B, ...] -> outs [K, B, ...], K >= 1.

        stream = nn.Stream(model, frames[0], read=lambda outs: outs[-1].argmax(-1))
        for frame in frames:  # [B, 700]
            decision = stream(frame[None])  # [B]

    The outputs are those of the whole sequence, however it is cut into calls. The stream takes a copy of the network, which stays
    as it is when the network is trained further, and runs it in evaluation mode. Each K compiles once.

    `stream.state` is the state after the last call: a tree of arrays, which may be kept and set again.

    Args:
      layer: a `Temporal` layer, such as a `Sequential` of a whole network.
      x: one step [B, ...], an array or its shape and dtype.
      read: a function of the outputs [K, B, ...], compiled with the network, such as a decision; None (the default) returns
        the outputs.
    """

    def __init__(self, layer: Temporal, x: PyTree, *, read: Callable | None = None):
        if not isinstance(layer, Temporal):
            raise TypeError(f"layer must run along time, such as nn.Sequential(...); got {layer!r}")
        if read is not None and not callable(read):
            raise TypeError(f"read must be a function of the outputs, or None; got {read!r}")
        for path, module in nnx.iter_modules(layer):
            if isinstance(module, PSN | TEBN):
                raise ValueError(
                    f"layer must have no {type(module).__name__}, which needs all T steps at once; got one at "
                    f"{'.'.join(map(str, path))}. A SlidingPSN can stream"
                )
        layer = nnx.clone(layer)
        layer.eval()
        graphdef, variables = nnx.split(layer)
        self._variables, tree = jax.tree.flatten(variables)
        self._like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *jnp.shape(x)), jnp.result_type(x)), x)
        self._first = layer.init_state(self._like)
        self.reset()

        @jax.jit
        def run(variables, state, xs):
            outs, state = nnx.merge(graphdef, tree.unflatten(variables))(xs, state)
            return outs if read is None else read(outs), state

        self._run = run

    def reset(self) -> None:
        """Start a new sequence: the state before its first step."""
        self.state = self._first

    def __call__(self, xs: PyTree) -> PyTree:
        if bad := [x for x in jax.tree.leaves(xs) if not hasattr(x, "shape")]:
            raise TypeError(f"xs must be arrays [K, B, ...]; got a {type(bad[0]).__name__} in it")
        got, want = ([(x.shape[1:], x.dtype) for x in jax.tree.leaves(tree)] for tree in (xs, self._like))
        if got != want or not all(len(x) for x in jax.tree.leaves(xs)):
            wanted = ", ".join(f"{dtype}[K, {', '.join(map(str, shape))}]" for shape, dtype in want)
            raise ValueError(
                f"xs must be {wanted} with K >= 1; got {[(x.shape, str(x.dtype)) for x in jax.tree.leaves(xs)]}"
            )
        outs, self.state = self._run(self._variables, self.state, xs)
        return outs

    def save(self, path: str | os.PathLike) -> None:
        """Write the state to a file in NumPy's format npz."""
        with open(path, "wb") as file:
            np.savez(file, *jax.tree.leaves(self.state))

    def restore(self, path: str | os.PathLike) -> None:
        """Continue from the state that `save` wrote. Raises ValueError if it is not a state of this network and batch."""
        with np.load(path) as file:
            found = [file[name] for name in file.files]
        wanted, tree = jax.tree.flatten(self._first)
        if len(found) == len(wanted):  # NumPy has no bfloat16: the file has its bytes
            found = [
                x.view(w.dtype) if x.dtype == f"V{w.dtype.itemsize}" else x for x, w in zip(found, wanted, strict=True)
            ]
        shapes = [[(x.shape, str(x.dtype)) for x in arrays] for arrays in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"path must hold the state of this network, arrays {shapes[0]}; {path} has {shapes[1]}")
        self.state = tree.unflatten(map(jnp.asarray, found))
