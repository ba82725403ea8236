"""Some rows of a store, spread over its units and views, without listing all of them."""

from typing import TYPE_CHECKING

import numpy as np

from feature_store.errors import InputError
from feature_store.format.addressing import RowId

if TYPE_CHECKING:
    from feature_store.store import Store

_SHARDS = 16


def sampled_shards(store: "Store", rng: np.random.Generator) -> list[list[RowId]]:
    """All readable rows of up to 16 units and views: of the first committed one, and of others at random.

    Raises:
        InputError: No unit is committed.
    """
    shards = [(unit, view) for unit in store.committed.units for view in sorted(store.committed_views(unit))]
    if not shards:
        raise InputError(f"{store.objects.url} holds no committed rows yet; cache at least one unit")
    others = sorted(rng.permutation(np.arange(1, len(shards)))[: _SHARDS - 1])
    source = store.source()
    return [source.unit_rows(*shard) for shard in (shards[0], *(shards[i] for i in others))]


def pick(rows: list[RowId], count: int, rng: np.random.Generator) -> list[RowId]:
    """Up to so many of the rows at random, in their own order."""
    return [rows[i] for i in sorted(rng.permutation(len(rows))[:count])]
