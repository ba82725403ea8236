"""``connect``: the store behind a service, for notebooks or trainers."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from feature_store.backends.credentials import TOKEN_VARIABLE
from feature_store.client.live import RemoteLiveSource, UnitViews
from feature_store.client.objects import ServedObjects
from feature_store.client.secret_files import read_secret_file
from feature_store.client.service import RetryPolicy, ServiceClient
from feature_store.client.source import REQUEST_BYTES, HttpSource, require_store
from feature_store.client.transport import Transport
from feature_store.errors import InputError
from feature_store.format.manifest import Manifest
from feature_store.store import Store, open_store_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FIRST_SECONDS = 10.0  # for the first answer: a wrong address should be known soon


class Features(dict[str, np.ndarray]):
    """Arrays [n, ...] by name: a tap's [n, N, C], ``logits`` [n, K], and ``rows`` [n, 3] with unit, position, view."""

    def torch(self, device: "str | torch.device" = "cpu") -> "dict[str, Tensor]":
        """The same as tensors."""
        from feature_store.teacher.tensors import as_tensors

        return as_tensors(self, device)


@dataclass(frozen=True)
class Client:
    """One service. Make it with connect; picklable, for threads and worker processes.

    Attributes:
        service: Calls to it.
        store: Its store, for everything but rows: manifest, keys, labels, view parameters, later blocks.
        max_rows: Most rows it gives at once.
        max_bytes: Most bytes it gives at once.
    """

    service: ServiceClient
    store: Store
    max_rows: int
    max_bytes: int

    @property
    def url(self) -> str:
        """Where it is."""
        return self.service.url

    @property
    def manifest(self) -> Manifest:
        """Manifest of its store."""
        return self.store.manifest

    def rows(self, keys: str | Sequence[str], view: int = 0, taps: Sequence[str] | None = None) -> Features:
        """Features of samples by key, in the order given.

        Args:
            keys: Sample keys, or one.
            view: View index.
            taps: Tap names; None for all.

        Raises:
            InputError: A key no committed unit holds, or an unknown tap.
            UncommittedError, QuarantinedError: A sample has no features of this view.
            ResourceError: The service stayed busy or out of reach.
        """
        batch = self._source.read_keys([keys] if isinstance(keys, str) else keys, view, taps)
        found = Features(batch.taps, rows=batch.rows)
        return found if batch.logits is None else Features(found, logits=batch.logits)

    def source(self, taps: Sequence[str] | None = None) -> HttpSource:
        """FeatureSource over its cached rows; taps None for all."""
        return HttpSource(self.service, self.store, taps, max_rows=self.max_rows, max_bytes=self.max_bytes)

    def live(
        self,
        taps: Sequence[str] | None = None,
        *,
        precision: Literal["f16", "f32"] = "f32",
        views: UnitViews | None = None,
    ) -> RemoteLiveSource:
        """FeatureSource over its live teacher, see RemoteLiveSource."""
        return RemoteLiveSource(self.service, taps, precision=precision, views=views)

    @cached_property
    def _source(self) -> HttpSource:
        return self.source()


def connect(
    url: str, token: str | None = None, *, retry: RetryPolicy | None = None, transport: Transport | None = None
) -> Client:
    """Open the store behind a service.

    Args:
        url: Of the service, ``http://host:port`` or ``https://...``.
        token: Bearer token; None for the one in the environment variable FEATURE_STORE_TOKEN, if it is set.
        retry: Retry policy of calls; None for retries within two minutes.
        transport: Sender of requests; None for HTTP connections to url.

    Raises:
        InputError: Not a service's URL, or the token is refused.
        ResourceError: It is out of reach.
        MismatchError: It changes stores while being opened.
    """
    retry = retry or RetryPolicy()
    service = ServiceClient.at(url, token or os.environ.get(TOKEN_VARIABLE, "").strip() or None, retry)
    if transport is not None:
        service = replace(service, transport=transport)
    first = replace(service, retry=replace(retry, deadline=min(_FIRST_SECONDS, retry.deadline)))
    described = first.json("/v1/manifest")
    try:
        identity, most = described["identity"], (described["max_rows"], described["max_response_bytes"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{url} does not answer as this service does ({error!r} is missing); check the URL") from error
    if not all(type(limit) is int and limit > 0 for limit in most):
        raise InputError(f"{url} does not answer as this service does (max_rows, max_response_bytes: {most}); check it")
    store = open_store_in(ServedObjects(service))
    require_store(url, store.manifest.identity(), identity)
    return Client(service, store, most[0], min(REQUEST_BYTES, most[1]))


def read_token(file: Path) -> str:
    """The token in a file, without the line's end.

    Raises:
        InputError: The file cannot be read, is not a regular file, is writable by all users, or holds no token.
    """
    try:
        token = read_secret_file(file, shared=True).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the token file {file} cannot be read: {error}") from error
    if not token:
        raise InputError(f"the token file {file} is empty; put the token into it, on one line")
    return token
