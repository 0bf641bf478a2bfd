"""What travels to the device, and how it is unpacked there, inside the jitted step: bits, bytes, and packed events.

A float32 frame of a 128 x 128 x 2 sensor is 128 KiB, its bits 4 KiB; a recording of n events is 8 n bytes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from snnfuse.data.events import Events, Sensor, addresses

PADDING = np.uint32(0xFFFFFFFF)  # the address of no event


def pack_bits(spikes: np.ndarray, lead: int = 1) -> np.ndarray:
    """[*lead, ...] to [*lead, ceil(n / 8)] uint8: whether each place is not zero, eight to a byte, lowest bit first."""
    return np.packbits(np.reshape(spikes != 0, (*spikes.shape[:lead], -1)), axis=-1, bitorder="little")


@partial(jax.jit, static_argnames=("shape", "dtype"))
def unpack_bits(packed: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """[..., ceil(n / 8)] uint8 to [..., *shape] of 0 and 1, n the product of `shape`: `pack_bits`, undone."""
    n = int(np.prod(shape))
    if packed.dtype != jnp.uint8 or packed.shape[-1] != -(-n // 8):
        raise ValueError(
            f"packed must be uint8 [..., {-(-n // 8)}] for shape {shape}; got {packed.dtype} {packed.shape}"
        )
    bits = (packed[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return bits.reshape(*packed.shape[:-1], -1)[..., :n].reshape(*packed.shape[:-1], *shape).astype(dtype)


def pack_events(events: Events, sensor: Sensor, size: int) -> np.ndarray:
    """[size, 2] uint32: t since the first event, and the address (y W + x) P + p; padded with `PADDING`."""
    n = len(events["t"])
    if n > size:
        raise ValueError(f"a recording of {n} events does not fit size = {size}")
    packed = np.full((size, 2), PADDING, np.uint32)
    packed[:n, 0] = events["t"].astype(np.int64) - int(events["t"][0])
    packed[:n, 1] = addresses(events, sensor)
    return packed


def _bins(packed: Array, valid: Array, T: int, split: str, dt: int | None) -> Array:
    n = valid.sum(dtype=jnp.uint32)
    if split == "number":
        position, width = jnp.arange(len(packed), dtype=jnp.uint32), n // T
    elif split == "time":
        position, width = packed[:, 0], jnp.where(valid, packed[:, 0], 0).max() // T
    elif split == "dt" and dt is not None:
        return packed[:, 0] // np.uint32(dt)
    else:
        raise ValueError(f"split must be 'number', 'time' or 'dt' with a dt; got {split!r}, dt={dt}")
    return jnp.where(width > 0, jnp.minimum(position // jnp.maximum(width, 1), T - 1), T - 1)


@partial(jax.jit, static_argnames=("sensor", "T", "split", "dt", "dtype"))
def bin_events(
    packed: Array, sensor: Sensor, T: int, *, split: str = "number", dt: int | None = None, dtype=jnp.float32
) -> Array:
    """`to_frames` on the device: packed [n, 2] to [T, H, W, P], and [B, n, 2] to time-major [T, B, H, W, P].

    Counts in `dtype`; the same events in the same bins as on the host, to the last one.
    """
    if packed.ndim == 3:
        each = partial(bin_events, sensor=sensor, T=T, split=split, dt=dt, dtype=dtype)
        return jax.vmap(each, out_axes=1)(packed)
    if packed.ndim != 2 or packed.shape[-1] != 2 or packed.dtype != jnp.uint32:
        raise ValueError(f"packed must be uint32 [n, 2] or [B, n, 2]; got {packed.dtype} {packed.shape}")
    valid = packed[:, 1] != PADDING
    bins = _bins(packed, valid, T, split, dt).astype(jnp.int32)
    inside = valid & (bins >= 0) & (bins < T)
    place = jnp.where(inside, bins * sensor.size + packed[:, 1].astype(jnp.int32), T * sensor.size)
    counts = jnp.zeros(T * sensor.size, jnp.int32).at[place].add(1, mode="drop")
    return counts.reshape(T, *sensor).astype(dtype)
