"""Objects in a bucket or behind a web server, through obstore."""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np

from feature_store.backends.base import Buffer, buffers_of, scatter
from feature_store.backends.credentials import bearer_headers, failure, s3_options
from feature_store.errors import InputError, ResourceError, UserError

SCHEMES = ("s3", "gs", "http", "https")
_RETRY = {
    "max_retries": 8,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
    "retry_timeout": timedelta(minutes=3),
}
_runtime_pid: int | None = None  # process whose threads serve obstore, shared by all its stores


class Version(NamedTuple):
    """One version of an object, as its service names it: S3 by entity tag, GCS by generation."""

    e_tag: str | None
    version: str | None


class _PastEndError(Exception):
    """A range that starts after the object's end."""


class RemoteObjects:
    """Objects behind ``s3://``, ``gs://`` or ``http(s)://``; a web server is read only.

    Credentials and endpoints come from where each service's own tools read them (``AWS_ACCESS_KEY_ID``,
    ``AWS_PROFILE`` and ~/.aws, ``AWS_ENDPOINT_URL``, ``GOOGLE_SERVICE_ACCOUNT``...); the token of a teacher service's
    store from ``FEATURE_STORE_TOKEN``. Server errors, dropped connections and timeouts are tried again with growing
    pauses, for three minutes at most.

    obstore keeps threads that do not survive a fork, so a process forked after the first use is refused instead of
    hanging; ``forkserver`` and ``spawn`` workers are fine, and so is a fork before the first use.
    """

    in_flight = 16
    gap_bytes = 1 << 20
    request_bytes = 4 << 20
    bytes_per_thread = 1

    def __init__(self, url: str) -> None:
        scheme = url.partition("://")[0]
        if scheme not in SCHEMES:
            raise InputError(f"cannot open {url}: expected a local path, file://, {'://, '.join(SCHEMES)}://")
        self.url = url.rstrip("/")
        self._read_only = scheme.startswith("http")
        self.lists = not self._read_only
        self._opened: tuple[Any, Any] | None = None

    def __reduce__(self):
        return RemoteObjects, (self.url,)

    def get(self, path: str) -> np.ndarray:
        """See ObjectStore.get."""
        with self._errors(path) as (obstore, store):
            return np.frombuffer(obstore.get(store, path).bytes(), np.uint8)

    def get_range(self, path: str, offset: int, length: int) -> np.ndarray:
        """See ObjectStore.get_range."""
        try:
            with self._errors(path) as (obstore, store):
                return np.frombuffer(obstore.get_range(store, path, start=offset, length=length), np.uint8)
        except _PastEndError:
            return np.empty(0, np.uint8)

    def read_into(self, path: str, offset: int, parts: Sequence[memoryview | int], *, wait: bool = True) -> bool:
        """See ObjectStore.read_into; nothing is in memory already."""
        if not wait:
            return False
        wanted = sum(part if isinstance(part, int) else len(part) for part in parts)
        scatter(self.get_range(path, offset, wanted), offset, parts)
        return True

    def opened(self, path: str) -> None:
        """See ObjectStore.opened: there are no files."""

    def size(self, path: str) -> int:
        """See ObjectStore.size."""
        with self._errors(path) as (obstore, store):
            return obstore.head(store, path)["size"]

    def version(self, path: str) -> str:
        """Version of an object: entity tag, modification time, length."""
        with self._errors(path) as (obstore, store):
            found = obstore.head(store, path)
            return f"{found['e_tag']} {found['last_modified']} {found['size']}"

    def list(self, prefix: str = "") -> list[str]:
        """See ObjectStore.list.

        Raises:
            InputError: A web server: it cannot list.
        """
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See ObjectStore.sizes.

        Raises:
            InputError: A web server: it cannot list.
        """
        if self._read_only:
            raise InputError(f"cannot list {self.url}: web servers do not list; use the bucket or a copy")
        folder = prefix.rpartition("/")[0]  # obstore takes whole path components only
        with self._errors(prefix) as (obstore, store):
            found = {entry["path"]: entry["size"] for page in obstore.list(store, folder or None) for entry in page}
        return {path: size for path, size in found.items() if path.startswith(prefix)}

    def put(self, path: str, payload: Buffer | Iterable[Buffer], *, new: bool = False) -> None:
        """See ObjectStore.put.

        Raises:
            InputError: A web server: it is read only; or there is no such bucket.
        """
        parts = list(buffers_of(payload))
        self._put(path, parts[0] if len(parts) == 1 else b"".join(parts), "create" if new else "overwrite")

    def get_version(self, path: str) -> tuple[bytes, Version]:
        """A whole object, and what put_version takes to replace exactly this version of it."""
        with self._errors(path) as (obstore, store):
            result = obstore.get(store, path)
            return bytes(result.bytes()), Version(e_tag=result.meta["e_tag"], version=result.meta["version"])

    def put_version(self, path: str, payload: bytes, replaces: Version | None) -> Version:
        """Write an object only in place of a given version of it, decided atomically; None: only if there is none.

        The same bytes may have the same version: a writer that must be told from others writes bytes of its own.

        Raises:
            FileExistsError: The object has another version, was deleted, or for None, exists.
            InputError: See put.
        """
        if replaces is None:
            return self._put(path, payload, "create")
        return self._put(path, payload, {name: value for name, value in replaces._asdict().items() if value})

    def _put(self, path: str, payload: Buffer, mode: str | dict[str, str]) -> Version:
        self._require_writable("write")
        with self._errors(path) as (obstore, store):
            try:
                # One request per object: a multipart upload cannot be conditional.
                return Version(**obstore.put(store, path, payload, mode=mode, use_multipart=False))
            except FileNotFoundError as error:
                raise InputError(f"{self.url}: there is no such bucket; make it, or choose another one") from error

    def sync(self, paths: Sequence[str]) -> None:
        """See ObjectStore.sync: a put that returned is durable."""

    def delete(self, path: str) -> None:
        """See ObjectStore.delete."""
        self._require_writable("delete")
        self.size(path)  # buckets do not say whether there was one
        with self._errors(path) as (obstore, store):
            obstore.delete(store, path)

    def forget(self, path: str) -> None:
        """See ObjectStore.forget: nothing is kept."""

    def _require_writable(self, what: str) -> None:
        if self._read_only:
            raise InputError(f"cannot {what} in {self.url}: a web server is read only; use the bucket's own URL")

    @contextmanager
    def _errors(self, path: str) -> Iterator[tuple[Any, Any]]:
        """The library and the store; converts the library's errors to this project's."""
        obstore, store = self._open()
        try:
            yield obstore, store
        except FileNotFoundError as error:  # obstore's own text is pages long
            raise FileNotFoundError(f"{self.url}/{path} does not exist") from error
        except obstore.exceptions.AlreadyExistsError as error:
            raise FileExistsError(f"{self.url}/{path} exists") from error
        except obstore.exceptions.PreconditionError as error:
            raise FileExistsError(f"{self.url}/{path} is another version, or was deleted") from error
        except obstore.exceptions.BaseError as error:
            if "416 Range Not Satisfiable" in str(error):
                raise _PastEndError from error
            denied = isinstance(
                error, (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError)
            )
            raise ResourceError(f"{self.url}/{path}: {failure(self.url, error, denied=denied)}") from error

    def _open(self) -> tuple[Any, Any]:
        global _runtime_pid
        if _runtime_pid not in (None, os.getpid()):
            raise ResourceError(
                f"{self.url} was used before this process was forked, and obstore's threads do not survive that; "
                'start workers with DataLoader(multiprocessing_context="forkserver"), or open the store in them first'
            )
        if self._opened is None:
            obstore = _import_obstore(self.url)
            self._opened = obstore, _guard(self.url, lambda: _store(obstore, self.url))
        _runtime_pid = os.getpid()
        return self._opened


def _import_obstore(url: str) -> Any:
    try:
        importlib.import_module("obstore.store")
        return importlib.import_module("obstore")
    except ImportError as error:
        raise InputError(f"cannot open {url}: obstore is not installed; pip install 'scalekd-cache[s3]'") from error


def _store(obstore: Any, url: str) -> Any:
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {"connect_timeout": "10s", "timeout": "120s"}
    more = s3_options(url) if scheme == "s3" else {}
    if scheme.startswith("http"):
        # obstore takes it out of requests that are redirected to another host or port.
        options["default_headers"] = bearer_headers(url)
    if scheme == "http" or more.get("endpoint", "").startswith("http://"):
        options["allow_http"] = True
    return obstore.store.from_url(url, client_options=options, retry_config=_RETRY, **more)


def _guard(url: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except UserError:
        raise
    except Exception as error:  # obstore: one class per cause, none of them ours
        raise InputError(f"cannot open {url}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
