"""The forms in which data travel to the device, bits and packed events, and how the jitted step unpacks them.

A float32 frame of a 128 x 128 x 2 sensor takes 128 KiB, its bits 4 KiB. A recording of n events takes 8 n bytes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from snnfuse.data import events as ev
from snnfuse.data.events import Events, Sensor

PADDING = np.uint32(0xFFFFFFFF)  # an address that no event has


def pack_bits(spikes: np.ndarray, lead: int = 1) -> np.ndarray:
    """[*lead, ...] to [*lead, ceil(n / 8)] uint8: a bit says that a place is not zero; lowest bit first."""
    return np.packbits(np.reshape(spikes != 0, (*spikes.shape[:lead], -1)), axis=-1, bitorder="little")


@partial(jax.jit, static_argnames=("shape", "dtype"))
def unpack_bits(packed: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """[..., ceil(n / 8)] uint8 to [..., *shape] of 0 and 1, where n is the product of `shape`. The inverse of `pack_bits`."""
    n = int(np.prod(shape))
    if packed.dtype != jnp.uint8 or packed.shape[-1] != -(-n // 8):
        raise ValueError(
            f"packed must be uint8 [..., {-(-n // 8)}] for shape {shape}; got {packed.dtype} {packed.shape}"
        )
    bits = (packed[..., None] >> jnp.arange(8, dtype=jnp.uint8)) & 1
    return bits.reshape(*packed.shape[:-1], -1)[..., :n].reshape(*packed.shape[:-1], *shape).astype(dtype)


def pack_events(
    events: Events, sensor: Sensor, size: int, name: str = "events", *, on_unsorted: str = "raise"
) -> np.ndarray:
    """[size, 2] uint32: t since the first event, and the address (y W + x) P + p; padded with `PADDING`.

    A recording must be shorter than 2^32 microseconds (71 minutes).
    """
    events = ev.check(events, sensor, name, on_unsorted=on_unsorted)
    t = events["t"].astype(np.int64)
    if len(t) > size:
        raise ValueError(f"a recording of {len(t)} events does not fit size = {size}")
    if len(t) and (since := int(t[-1] - t[0])) >= 2**32:
        raise ev.BadSample(
            name, f"event {len(t) - 1} has t = {t[-1]}, {since} after the first; 2^32 do not fit 32 bits"
        )
    packed = np.full((size, 2), PADDING, np.uint32)
    packed[: len(t), 0] = t - t[:1]
    packed[: len(t), 1] = ev.addresses(events, sensor)
    return packed


def _bins(packed: Array, valid: Array, T: int, split: str, dt: int | None) -> Array:
    n = valid.sum(dtype=jnp.uint32)
    if split == "dt":
        return packed[:, 0] // np.uint32(dt) if dt < 2**32 else jnp.zeros_like(packed[:, 0])
    if split == "number":
        position, width = jnp.cumsum(valid, dtype=jnp.uint32) - 1, n // T  # padding may lie between events
    else:
        position, width = packed[:, 0], jnp.where(valid, packed[:, 0], 0).max(initial=0) // T
    return jnp.where(width > 0, jnp.minimum(position // jnp.maximum(width, 1), T - 1), T - 1)


@partial(jax.jit, static_argnames=("sensor", "T", "split", "dt", "dtype"))
def bin_events(
    packed: Array, sensor: Sensor, T: int, *, split: str = "number", dt: int | None = None, dtype=jnp.float32
) -> Array:
    """`to_frames` on the device: packed [n, 2] to [T, H, W, P], and [B, n, 2] to time-major [T, B, H, W, P].

    Counts in `dtype`, the same as on the host. An integer dtype holds at most its largest value, bool whether there was
    any event.
    """
    ev.at_least("T", T, 1)
    ev.check_split(split, T, dt)
    if T * sensor.size >= 2**31:
        raise ValueError(
            f"T frames of {tuple(sensor)} have {T * sensor.size} places; 2^31 - 1 fit the device's indices"
        )
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
    if jnp.issubdtype(dtype, jnp.integer):
        counts = jnp.minimum(counts, min(jnp.iinfo(dtype).max, 2**31 - 1))
    return counts.reshape(T, *sensor).astype(dtype)
