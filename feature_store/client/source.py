"""HttpSource: cached rows from a service, decoded by the client."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from feature_store.client.service import ServiceClient, at_once
from feature_store.errors import InputError, MismatchError, WireError
from feature_store.format.addressing import Rows, row_array
from feature_store.source import FeatureBatch
from feature_store.store import Store

_ROWS = "rows"
REQUEST_BYTES = 64 << 20


class HttpSource:
    """FeatureSource over a service's cached rows: the same values, bit for bit, as the store's own source.

    Rows travel as stored (int8 codes, not floats) and are decoded here, so that little is sent; each array is compared
    with its crc32c, each answer with the store that was opened. Connections are each process's own: an instance may be
    used, forked, pickled and used again, from several threads. Make one with ``feature_store.connect``.

    Args:
        service: The service.
        store: Its store, opened over ``ServedObjects``: manifest, codecs and which rows there are.
        taps: Taps to read by default; None for all.
        max_rows: Most rows the service gives at once.
        max_bytes: Most bytes the service gives at once; more are asked for in several requests.
        in_flight: Requests at once, where several are needed.
    """

    needs_pixels = False

    def __init__(
        self,
        service: ServiceClient,
        store: Store,
        taps: Sequence[str] | None = None,
        *,
        max_rows: int = 4096,
        max_bytes: int = REQUEST_BYTES,
        in_flight: int = 4,
    ) -> None:
        self.service, self.manifest = service, store.manifest
        self._layout = store.source(taps)
        self.tap_names = self._layout.tap_names
        self._max_rows, self._max_bytes, self._in_flight = max_rows, max_bytes, in_flight

    def read(
        self,
        rows: Rows,
        taps: Sequence[str] | None = None,
        *,
        pixels: np.ndarray | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        decode: bool = True,
    ) -> FeatureBatch:
        """See FeatureSource.read and ZarrSource.read: out and decode are as there, pixels are not looked at.

        Raises:
            MismatchError: The service now has another store.
            ResourceError: It was busy or out of reach for as long as the retry policy allows.
            WireError: Its answers stayed damaged.
            UncommittedError, QuarantinedError, CorruptStoreError, InputError: See ZarrSource.read.
        """
        rows = row_array(rows)
        memory = self._layout.memory(len(rows), taps, out or {})
        self.fill(rows, memory, taps)
        return self._layout.batch(rows, memory, taps, decode=decode)

    def iter_unit(
        self,
        unit: int,
        view: int,
        taps: Sequence[str] | None = None,
        *,
        batch_size: int = 256,
        out: Mapping[str, np.ndarray] | None = None,
        decode: bool = True,
    ) -> Iterator[FeatureBatch]:
        """See FeatureSource.iter_unit; the next batch is on its way while one is used, unless out is to be filled."""
        rows = self._layout.unit_rows(unit, view)
        parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        if out is not None:
            for part in parts:
                yield self.read(part, taps, out=out, decode=decode)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="feature-store-http") as ahead:
            coming: Future[FeatureBatch] | None = None
            for part in [*parts, None]:
                ready = coming
                coming = None if part is None else ahead.submit(self.read, part, taps, decode=decode)
                if ready is not None:
                    yield ready.result()

    def unit_rows(self, unit: int, view: int) -> np.ndarray:
        """All readable rows of one unit and view in position order: int64 [n, 3].

        Raises:
            UncommittedError: They were not committed when the store was opened.
        """
        return self._layout.unit_rows(unit, view)

    def buffers(self, rows: int, taps: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Memory that fits ``out`` of read, see ZarrSource.buffers."""
        return self._layout.buffers(rows, taps)

    def row_bytes(self, taps: Sequence[str] | None = None) -> int:
        """Bytes of one row in the buffers, and nearly as many on the wire."""
        return self._layout.row_bytes(taps)

    def fill(self, rows: np.ndarray, memory: Mapping[str, np.ndarray], taps: Sequence[str] | None = None) -> None:
        """Read rows [n, 3] into memory that fits, see buffers.

        Raises:
            UserError: See read.
        """
        got = self._ask("rows", rows.tolist(), memory, taps)
        if not np.array_equal(got, rows):
            raise WireError(f"{self.service.url} answered with other rows than those requested; check the proxies")

    def read_keys(self, keys: Sequence[str], view: int, taps: Sequence[str] | None = None) -> FeatureBatch:
        """Features of samples by key, in the order given; the service knows where they are.

        Raises:
            UserError: See read; InputError also for a key no committed unit holds.
        """
        memory = self._layout.memory(len(keys), taps, {})
        rows = self._ask("keys", [[key, view] for key in keys], memory, taps)
        return self._layout.batch(rows, memory, taps)

    def _ask(
        self, what: str, names: list[Any], memory: Mapping[str, np.ndarray], taps: Sequence[str] | None
    ) -> np.ndarray:
        """Fill memory [n, ...] with rows by address or key; their addresses, int64 [n, 3]."""
        wanted = list(self.tap_names if taps is None else taps)
        most = max(1, min(self._max_rows, self._max_bytes // max(1, self.row_bytes(wanted))))
        step = -(-len(names) // -(-len(names) // most)) if names else 1  # of one size: none is waited for longer
        rows = np.empty((len(names), 3), np.int64)
        requests = []
        for start in range(0, len(names), step):
            stop = min(start + step, len(names))
            out = {name: array[start:stop] for name, array in {**memory, _ROWS: rows}.items()}
            asked = {what: names[start:stop], "taps": wanted, "decode": False}
            requests.append(partial(self._request, asked, stop - start, out))
        at_once(requests, self._in_flight)
        return rows

    def _request(self, asked: dict[str, Any], rows: int, out: dict[str, np.ndarray]) -> None:
        try:
            try:
                arrays, strings = self._post(asked, out, retry_damaged=False)
            except WireError:  # the service reads and checks all rows first, and reports damage of its store
                arrays, strings = self._post({**asked, "verify": True}, out)
        except InputError:  # the service may now serve another store
            described = self.service.json("/v1/manifest")
            self._require_store(described.get("identity") if isinstance(described, dict) else None)
            raise
        self._require_store(strings.get("store"))
        for name in out:
            if name not in arrays or len(arrays[name]) != rows:
                raise WireError(f"{self.service.url} answered without {rows} rows of {name}; is it of this release?")

    def _post(
        self, asked: dict[str, Any], out: dict[str, np.ndarray], *, retry_damaged: bool = True
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        body = json.dumps(asked, separators=(",", ":")).encode()
        return self.service.frame(
            "POST", "/v1/rows:batch", body, media_type="application/json", out=out, retry_damaged=retry_damaged
        )

    def _require_store(self, identity: str | None) -> None:
        require_store(self.service.url, self.manifest.identity(), identity)


def require_store(url: str, expected: str, got: str | None) -> None:
    """Refuse an answer that is about another store than the one opened.

    Raises:
        MismatchError: Names both.
    """
    if got != expected:
        raise MismatchError(
            "store identity",
            where=f"what was opened at {url}",
            expected=expected,
            got=got,
            remedy="the service now has another store: open it again, and restart the runs that train on it",
        )
