"""Random subsets of a store's rows."""

from typing import TYPE_CHECKING

import numpy as np

from feature_store.errors import InputError

if TYPE_CHECKING:
    from feature_store.store import Store

_SHARDS = 16


def sampled_shards(store: "Store", rng: np.random.Generator) -> list[np.ndarray]:
    """All readable rows [n, 3] of up to 16 units and views: of the first committed one, and of others at random.

    Raises:
        InputError: No unit is committed.
    """
    shards = [(unit, view) for unit in store.committed.units for view in sorted(store.committed_views(unit))]
    if not shards:
        raise InputError(f"{store.objects.url} holds no committed rows yet; cache at least one unit")
    others = sorted(rng.permutation(np.arange(1, len(shards)))[: _SHARDS - 1])
    source = store.source()
    return [source.unit_rows(*shard) for shard in (shards[0], *(shards[i] for i in others))]


def pick(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Up to a number of the rows [n, 3] at random, in their own order."""
    return rows[np.sort(rng.permutation(len(rows))[:count])]
