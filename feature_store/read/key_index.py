"""KeyIndex: rows by sample key, looked up in batches."""

from collections.abc import Iterable, Sequence

import numpy as np

from feature_store.errors import InputError

_WORD = 8
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
_SHIFT = np.uint64(29)


class KeyIndex:
    """Sample keys of committed units and where they are.

    The hash in here is only in memory and chosen for speed; keys themselves are always compared.

    Args:
        units: Unit and its stored keys, uint8 [n, width], in position order.
        width: Bytes per key.
    """

    def __init__(self, units: Iterable[tuple[int, np.ndarray]], width: int) -> None:
        self._width = width
        parts = list(units)
        self._units = np.array([unit for unit, _ in parts], np.int64)
        self._starts = np.cumsum([0, *(len(keys) for _, keys in parts)])
        self._words = np.zeros((int(self._starts[-1]), -(-width // _WORD)), np.uint64)
        stored = self._words.view(np.uint8)
        for start, (_, keys) in zip(self._starts, parts, strict=False):
            stored[start : start + len(keys), :width] = keys
        hashes = _hashes(self._words)
        order = np.argsort(hashes, kind="stable")
        self._words, self._where = self._words[order], order.astype(np.uint32)
        self._shift = np.uint64(63 - len(order).bit_length())
        buckets = np.arange((1 << (63 - int(self._shift)) + 1) + 1, dtype=np.uint64)
        self._buckets = np.searchsorted(hashes[order] >> self._shift, buckets).astype(np.uint32)

    def __len__(self) -> int:
        return len(self._words)

    def rows(self, keys: Sequence[str], view: int) -> np.ndarray:
        """Addresses of samples, in the order given: int64 [n, 3].

        Raises:
            InputError: A key is not there.
        """
        found = self._find(self._encode(keys))
        if (missing := np.flatnonzero(found < 0)).size:
            raise InputError(
                f"no committed unit holds sample key {keys[missing[0]]!r}; check the key, or finish the store"
            )
        at = np.searchsorted(self._starts, found, side="right") - 1
        positions = found - self._starts[at]
        return np.column_stack([self._units[at], positions, np.full(len(at), view)])

    def _encode(self, keys: Sequence[str]) -> np.ndarray:
        """Words per key, [n, words]; all ones, which no UTF-8 text has, for a key that cannot be stored."""
        encoded = [key.encode() for key in keys]
        if max(map(len, encoded), default=0) > self._width or "\0" in "".join(keys):
            impossible = b"\xff" * self._width
            encoded = [impossible if len(raw) > self._width or b"\0" in raw else raw for raw in encoded]
        words = self._words.shape[1]
        return np.array(encoded, f"S{words * _WORD}").view(np.uint64).reshape(len(keys), words)

    def _find(self, wanted: np.ndarray) -> np.ndarray:
        """Index of each wanted key among all stored ones, -1 where there is none."""
        bucket = _hashes(wanted) >> self._shift
        at, end = self._buckets[bucket].astype(np.int64), self._buckets[bucket + np.uint64(1)]
        found = np.full(len(wanted), -1)
        left = np.flatnonzero(at < end)
        while left.size:  # as often as the fullest bucket has keys: a handful
            same = (self._words[at[left]] == wanted[left]).all(axis=1)
            found[left[same]] = self._where[at[left[same]]]
            left = left[~same]
            at[left] += 1
            left = left[at[left] < end[left]]
        return found


def _hashes(words: np.ndarray) -> np.ndarray:
    mixed = np.zeros(len(words), np.uint64)
    for word in words.T:
        mixed = (mixed ^ word) * _FACTOR
        mixed ^= mixed >> _SHIFT
    return mixed * _FACTOR
