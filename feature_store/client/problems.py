"""Kinds of problems that the HTTP service reports, RFC 9457."""

from collections.abc import Mapping
from dataclasses import dataclass

from feature_store.errors import (
    CorruptStoreError,
    InputError,
    QuarantinedError,
    ResourceError,
    UncommittedError,
    UserError,
    WireError,
)

MEDIA_TYPE = "application/problem+json"
URN = "urn:scalekd-cache:problem:"
RETRIED_STATUSES = frozenset({408, 429, 502, 503, 504})
"""Statuses after which the same request may succeed later; proxies send some of them."""


@dataclass(frozen=True)
class ProblemKind:
    """A kind of problem; its name is part of its type and never changes.

    Attributes:
        status: HTTP status.
        title: Meaning, one phrase.
        error: Error class that the client raises for it.
        retry: Whether the response carries Retry-After.
    """

    status: int
    title: str
    error: type[UserError] = InputError
    retry: bool = False


KINDS: Mapping[str, ProblemKind] = {
    "malformed": ProblemKind(400, "The request is not valid HTTP or JSON"),
    "unauthorized": ProblemKind(401, "A bearer token is needed"),
    "forbidden": ProblemKind(403, "The token's scopes do not include this"),
    "not-found": ProblemKind(404, "There is nothing at this path"),
    "unknown-key": ProblemKind(404, "No committed unit holds this sample key"),
    "unknown-tap": ProblemKind(404, "The store has no such tap"),
    "uncommitted": ProblemKind(404, "No commit record covers this row", UncommittedError),
    "method-not-allowed": ProblemKind(405, "The path does not take this method"),
    "request-timeout": ProblemKind(408, "The request's body did not arrive in time", ResourceError),
    "quarantined": ProblemKind(410, "The row's sample was quarantined: it has no features", QuarantinedError),
    "object-missing": ProblemKind(410, "A committed object is missing: the store is damaged", CorruptStoreError),
    "precondition-failed": ProblemKind(412, "The object has changed"),
    "too-large": ProblemKind(413, "The request or its response is larger than this service allows"),
    "unsupported-media-type": ProblemKind(415, "The request's body has an unsupported media type"),
    "range-not-satisfiable": ProblemKind(416, "The range starts after the object's end"),
    "misdirected": ProblemKind(421, "This host name is not this service's"),
    "invalid-request": ProblemKind(422, "The request does not have the form the API describes"),
    "overloaded": ProblemKind(429, "The service is at capacity", ResourceError, retry=True),
    "headers-too-large": ProblemKind(431, "The request's headers are larger than this service allows"),
    "internal": ProblemKind(500, "Internal error of the service", ResourceError),
    "corrupt-store": ProblemKind(500, "Committed bytes of the store are damaged", CorruptStoreError),
    "not-ready": ProblemKind(
        503, "The service is loading, draining, or has lost its device", ResourceError, retry=True
    ),
    "resource": ProblemKind(503, "I/O, network or device failure", ResourceError, retry=True),
    "deadline": ProblemKind(503, "No response by the deadline", ResourceError, retry=True),
}

_KIND_OF: Mapping[type[UserError], str] = {
    UncommittedError: "uncommitted",
    QuarantinedError: "quarantined",
    CorruptStoreError: "corrupt-store",
    InputError: "invalid-request",
    WireError: "invalid-request",  # a service decodes only its clients' bodies
    ResourceError: "resource",
}


def error_class(problem_type: str, status: int) -> type[UserError]:
    """The error a client raises for a problem's type; for responses of proxies, by their status."""
    kind = KINDS.get(problem_type.removeprefix(URN))
    if kind is not None:
        return kind.error
    return ResourceError if status >= 500 or status in RETRIED_STATUSES else InputError


def kind_of(error: UserError) -> str:
    """The kind of problem a service reports for an error."""
    return next((_KIND_OF[base] for base in type(error).__mro__ if base in _KIND_OF), "internal")
