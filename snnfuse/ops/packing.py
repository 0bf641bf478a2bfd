"""Spikes as bits: 8 or 32 time steps of a neuron in one word."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Packed:
    """An `out_dtype` that stores spikes as bits: words [ceil(T / steps), *B, N].

    Bit k of word w is 1 where the output at t = steps w + k is not 0. `steps` is 8 (uint8) or 32 (uint32). A packed output
    carries no gradient. `unpack` reverses it.
    """

    steps: int = 8

    def __post_init__(self):
        if self.steps not in (8, 32):
            raise ValueError(f"Packed: steps must be 8 or 32; got {self.steps}")

    @property
    def word(self):
        return jnp.dtype(f"uint{self.steps}")

    def words(self, outs: list[Array]) -> list[Array]:
        """Words made of successive outputs; the first output belongs to a step that is a multiple of `steps`."""
        bits = [jax.lax.select(s != 0, jnp.full_like(s, 1, self.word), jnp.zeros_like(s, self.word)) for s in outs]
        words = []
        for start in range(0, len(bits), self.steps):
            word = bits[start]
            for k, bit in enumerate(bits[start + 1 : start + self.steps], 1):
                word = word | (bit << jnp.full_like(bit, k))
            words.append(word)
        return words


def pack(spikes: Array, steps: int = 8) -> Array:
    """Words [ceil(T / steps), *B, N] of [T, *B, N]; a bit is 1 where the value is not 0."""
    packed = Packed(steps)
    padded = jnp.pad(spikes != 0, [(0, -len(spikes) % steps)] + [(0, 0)] * (spikes.ndim - 1))
    shift = jnp.arange(steps, dtype=packed.word).reshape(1, steps, *(1,) * (spikes.ndim - 1))
    return (padded.reshape(-1, steps, *spikes.shape[1:]).astype(packed.word) << shift).sum(1, dtype=packed.word)


def unpack(words: Array, T: int, dtype=jnp.bool_) -> Array:
    """Packed spikes back to [T, *B, N], 0 and 1 in `dtype`. Raises ValueError if the words do not hold T steps."""
    steps = jnp.iinfo(words.dtype).bits
    if not 0 <= len(words) * steps - T < steps:
        raise ValueError(
            f"T must be in {(len(words) - 1) * steps + 1}..{len(words) * steps} for {words.shape}; got {T}"
        )
    shift = jnp.arange(steps, dtype=words.dtype).reshape(1, steps, *(1,) * (words.ndim - 1))
    bits = (words[:, None] >> shift) & jnp.ones((), words.dtype)
    return bits.reshape(-1, *words.shape[1:])[:T].astype(dtype)
