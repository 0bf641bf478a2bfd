"""Random changes of events on the device, keyed, for the jitted step. `augment.py` has those of the host.

Events are packed, [B, n, 2] as `packed.pack_events` makes them. An event that a change removes becomes `packed.PADDING`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from snnfuse.data.events import Sensor, at_least
from snnfuse.data.packed import PADDING


def _check(packed: Array, **ranges: tuple[float, float, float]) -> Array:
    packed = jnp.asarray(packed)
    if packed.ndim != 3 or packed.shape[-1] != 2 or packed.dtype != jnp.uint32:
        raise ValueError(f"packed must be uint32 [B, n, 2]; got {packed.dtype} {packed.shape}")
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}]; got {value}")
    return packed


def _places(packed, sensor):
    """(whether an event is there, x, y, p) of [B, n, 2]."""
    address = packed[..., 1]
    there = address != PADDING
    pixel = (address // sensor.polarities).astype(jnp.int32)
    return there, pixel % sensor.width, pixel // sensor.width, address % sensor.polarities


def _with_places(packed, there, x, y, p, sensor):
    address = ((y * sensor.width + x) * sensor.polarities).astype(jnp.uint32) + p
    return jnp.where(there[..., None], jnp.stack([packed[..., 0], address], -1), PADDING)


@partial(jax.jit, static_argnames=("sensor", "shift", "flip", "scale", "turn"))
def move(
    key: Array,
    packed: Array,
    sensor: Sensor,
    *,
    shift: float = 0.0,
    flip: float = 0.0,
    scale: float = 0.0,
    turn: float = 0.0,
) -> Array:
    """Each recording mirrored, scaled and turned around the middle of the sensor, and moved. Events that leave it are removed.

        (x, y) = middle + factor R(angle) ((x, y) - middle) + (dx, dy), rounded

    Args:
      shift: dx and dy are uniform in -shift .. shift, in pixels.
      flip: the probability that left and right are exchanged.
      scale: ln(factor) is uniform in -ln(1 + scale) .. ln(1 + scale).
      turn: the angle is uniform in -turn .. turn, in degrees.
    """
    packed = _check(packed, shift=(shift, 0, 1e6), flip=(flip, 0, 1), scale=(scale, 0, 1e3), turn=(turn, 0, 180))
    keys, B = jax.random.split(key, 4), len(packed)
    there, x, y, p = _places(packed, sensor)
    middle = (sensor.width - 1) / 2, (sensor.height - 1) / 2
    x, y = x - middle[0], y - middle[1]
    x = jnp.where(jax.random.uniform(keys[0], (B, 1)) < flip, -x, x)
    uniform = lambda key, most, shape=(B, 1): jax.random.uniform(key, shape, minval=-most, maxval=most)
    factor, angle = jnp.exp(uniform(keys[1], jnp.log1p(scale))), uniform(keys[2], jnp.deg2rad(turn))
    moved = uniform(keys[3], shift, (2, B, 1))
    across, down = factor * jnp.cos(angle), factor * jnp.sin(angle)
    new_x = jnp.round(middle[0] + across * x - down * y + moved[0]).astype(jnp.int32)
    new_y = jnp.round(middle[1] + down * x + across * y + moved[1]).astype(jnp.int32)
    there &= (new_x >= 0) & (new_x < sensor.width) & (new_y >= 0) & (new_y < sensor.height)
    return _with_places(packed, there, new_x, new_y, p, sensor)


@partial(jax.jit, static_argnames=("most",))
def drop(key: Array, packed: Array, most: float) -> Array:
    """Each recording loses a random part of its events: each one with a probability that is uniform in 0 .. `most`."""
    packed, (part, each) = _check(packed, most=(most, 0, 1)), jax.random.split(key)
    rate = jax.random.uniform(part, (len(packed), 1), maxval=most)
    gone = jax.random.uniform(each, packed.shape[:2]) < rate
    return jnp.where(gone[..., None], PADDING, packed)


@partial(jax.jit, static_argnames=("sensor", "height", "width"))
def resize(packed: Array, sensor: Sensor, height: int, width: int) -> Array:
    """The events of a sensor of `height` x `width`: x becomes x width // W, y becomes y height // H. No event is lost."""
    packed, height, width = _check(packed), at_least("height", height, 1), at_least("width", width, 1)
    there, x, y, p = _places(packed, sensor)
    small = sensor._replace(height=height, width=width)
    return _with_places(packed, there, x * width // sensor.width, y * height // sensor.height, p, small)


@partial(jax.jit, static_argnames=("length", "longer"))
def piece(key: Array, packed: Array, length: int, longer: float = 0.0) -> Array:
    """A random stretch of each recording, which counts its time from 0: its duration is `length` microseconds times a factor.

        ln(factor) uniform in 0 .. ln(1 + longer);   the stretch lies inside of the recording, if that is long enough

    In as many frames of equal duration, a longer stretch shows faster motion.
    """
    packed, (long, at) = _check(packed, longer=(longer, 0, 1e3)), jax.random.split(key)
    length, top, B = at_least("length", length, 1), jnp.log1p(longer), len(packed)
    t, there = packed[..., 0], packed[..., 1] != PADDING
    duration = length * jnp.exp(jax.random.uniform(long, (B, 1), maxval=top))
    whole = jnp.where(there, t, 0).max(1, keepdims=True).astype(jnp.float32) + 1
    start = (jax.random.uniform(at, (B, 1)) * jnp.maximum(whole - duration, 0)).astype(jnp.uint32)
    there &= (t >= start) & (t < start + duration.astype(jnp.uint32))
    return jnp.where(there[..., None], jnp.stack([t - start, packed[..., 1]], -1), PADDING)
