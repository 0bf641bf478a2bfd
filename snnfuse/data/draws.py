"""Random draws for augmentations that run inside of the jitted step."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def beta_share(key: Array, alpha: float, shape: tuple[int, ...] = ()) -> Array:
    """Draws from Beta(alpha, alpha), float32: uniform draws, put through 4,096 quantiles with straight lines between them.

    `jax.random.beta` draws by loops of unknown length; before each round a GPU waits for the host.
    """
    quantiles = jnp.asarray(_quantiles(alpha))
    cells, part = jnp.divmod(jax.random.uniform(key, shape) * (len(quantiles) - 1), 1)
    below = cells.astype(jnp.int32)
    return quantiles[below] * (1 - part) + quantiles[below + 1] * part


@lru_cache
def _quantiles(alpha):
    from scipy.special import betaincinv  # here, because the import takes time and few runs need it

    return betaincinv(alpha, alpha, np.linspace(0, 1, 4097)).astype(np.float32)
