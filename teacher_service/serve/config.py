"""Configuration of ``serve``."""

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from feature_store.errors import InputError
from feature_store.inputs.options import TarOptions
from feature_store.tools.options import check_fields, require

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one client's requests, and of all together.

    Attributes:
        max_rows: Most rows of one answer.
        max_response_bytes: Most bytes of one answer; the store's own objects may be longer.
        max_body_bytes: Most bytes of one request's body.
        max_header_bytes: Most bytes of one request's headers.
        max_bytes_in_flight: Most bytes of answers on their way at once, and as many of requests' bodies; more are
            refused with 429.
        max_requests: Most requests in work at once; more are refused with 429.
        max_connections: Most open connections; more are closed.
        header_seconds: Time a request's headers have to arrive.
        body_seconds: Time a request's body has to arrive.
        stall_seconds: Time a reader may take nothing of its answer; then its connection is closed.
    """

    max_rows: int = 4096
    max_response_bytes: int = 256 * _MIB
    max_body_bytes: int = 64 * _MIB
    max_header_bytes: int = 64 << 10
    max_bytes_in_flight: int = 1024 * _MIB
    max_requests: int = 256
    max_connections: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    stall_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Refuse values no service could use.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        check_fields(self)
        for name, value in vars(self).items():
            require(value > 0, f"--{name.replace('_', '-')}", value, "more than 0")
        fits = self.max_bytes_in_flight >= self.max_response_bytes
        require(fits, "--max-bytes-in-flight", self.max_bytes_in_flight, "at least --max-response-bytes")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(TarOptions):
    """Configuration of the service: store, tokens, live teacher, limits.

    Attributes:
        store: The store: a path, ``s3://`` or ``gs://``.
        tars: The store's tars: paths, brace patterns, URLs; given, the page shows views beside their features.
        teacher: Name of the store's teacher; given, POST /v1/features:compute runs it.
        checkpoint: The teacher's weights (safetensors or torch file); default timm's pretrained ones, fetched.
        device: Where the teacher runs, e.g. cuda:1; auto takes a GPU if there is one.
        max_batch: Most views of one forward pass.
        max_wait: Seconds the first views of a batch wait for more.
        queue_rows: Most views that wait; more are refused with 429.
        host: Address to listen on. Anything but loopback needs --tokens, or --allow-anonymous.
        port: Port to listen on; 0 takes a free one.
        tokens: File of bearer tokens, see ``teacher-service token create``. Without it every client may
            read and compute.
        allow_anonymous: Listen beyond this machine without tokens. For networks where every client is trusted.
        cors_origins: Web pages whose scripts may ask, as ``https://host[:port]``; pages of other origins are kept from
            reading answers by the browser.
        tls_cert: Certificate chain (PEM): serve https.
        tls_key: Its private key (PEM).
        workers: Processes. Cached rows only: a teacher takes one process per GPU.
        refresh_seconds: Time between looks for rows committed since; 0 for never.
        drain_delay: Seconds between SIGTERM, when readiness ends, and when no new connection is taken any more.
        drain_seconds: Seconds that requests in work then have to end.
        limits: Limits of requests.
    """

    store: str | Path
    tars: tuple[str, ...] = ()
    teacher: str | None = None
    checkpoint: Path | None = None
    device: str = "auto"
    max_batch: int = 64
    max_wait: float = 0.005
    queue_rows: int = 1024
    host: str = "127.0.0.1"
    port: int = 8000
    tokens: Path | None = None
    allow_anonymous: bool = False
    cors_origins: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    workers: int = 1
    refresh_seconds: float = 10.0
    drain_delay: float = 0.0
    drain_seconds: float = 60.0
    limits: OmitArgPrefixes[Limits] = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Refuse values no service could use, and insecure services.

        Raises:
            InputError: Names the option, the value and what is accepted.
        """
        check_fields(self)
        require(0 <= self.port < 2**16, "--port", self.port, "0 to 65535")
        require(self.workers >= 1, "--workers", self.workers, "at least 1")
        for name in ("refresh_seconds", "drain_delay", "drain_seconds"):
            require(getattr(self, name) >= 0, f"--{name.replace('_', '-')}", getattr(self, name), "0 or more")
        if self.checkpoint is not None and self.teacher is None:
            raise InputError("--checkpoint without --teacher: say which timm model it is of, or leave it out")
        if self.teacher is not None and self.workers > 1:
            raise InputError(
                f"--workers {self.workers} with --teacher: each worker would load the teacher onto the same device; "
                "start one service per GPU with --device cuda:N and its own --port, and another one with --workers "
                "for cached rows"
            )
        for origin in self.cors_origins:
            fits = re.fullmatch(r"https?://[a-z0-9.:\[\]-]+", origin) is not None  # as browsers write them
            require(fits, "--cors-origins", origin, "origins such as https://lab.example.org: small letters, no path")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key belong together; give both or none")
        self._require_known_readers()

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def _require_known_readers(self) -> None:
        if self.tokens is not None and self.allow_anonymous:
            raise InputError("--allow-anonymous with --tokens contradict each other; leave one of them out")
        if self.tokens is None and not self.allow_anonymous and not self.loopback:
            raise InputError(
                f"--host {self.host} is open to other machines and there are no tokens; make one with "
                "`teacher-service token create --file tokens.jsonl --name NAME --scope read` and pass --tokens "
                "tokens.jsonl, listen on 127.0.0.1, or pass --allow-anonymous"
            )
