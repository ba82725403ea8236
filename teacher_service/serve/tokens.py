"""Bearer tokens, kept as hashes in a file."""

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from feature_store.client.secret_files import UntrustedFileError, read_secret_file
from feature_store.errors import InputError, UserError

Scope = Literal["read", "compute", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_NAME = "^[A-Za-z0-9._-]{1,64}$"
_PREFIX = "skc_"  # people and secret scanners know one when they see it
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Token:
    """The stored form of a token.

    Attributes:
        name: Whose it is; appears in logs.
        sha256: Of the token, which has 256 random bits: nothing slower than one hash is needed.
        scopes: Scopes it grants: read (cached rows and the store), compute (the live teacher), admin (everything).
        created: When, ISO 8601.
    """

    name: Annotated[str, Field(pattern=_NAME)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...]
    created: str

    def allows(self, scope: Scope) -> bool:
        """Whether it grants a scope."""
        return scope in self.scopes or "admin" in self.scopes


_TOKEN = TypeAdapter(Token)


def create_token(file: Path, name: str, scopes: Sequence[Scope]) -> str:
    """Make a token and append its hash to the file; the token itself is not stored.

    Raises:
        InputError: The name is taken or has other characters than letters, digits, dot, underscore and hyphen; no
            scope; or the file is not a token file, or its folder is missing.
    """
    if not re.fullmatch(_NAME, name):
        raise InputError(f"--name is {name!r}, expected at most 64 letters, digits, dots, underscores and hyphens")
    if not scopes:
        raise InputError(f"--scope is empty, expected some of {', '.join(SCOPES)}")
    if not file.parent.is_dir():
        raise InputError(f"--file is {file}, but there is no folder {file.parent}; make it first")
    if file.exists() and any(token.name == name for token in read_tokens(file)):
        raise InputError(f"{file} has a token named {name!r}; choose another name, or remove its line first")
    secret = _PREFIX + secrets.token_urlsafe(32)
    token = Token(name, _sha256(secret), tuple(dict.fromkeys(scopes)), datetime.now(UTC).isoformat(timespec="seconds"))
    # An editor may have left the last line without its end.
    begin = b"\n" if file.exists() and file.read_bytes()[-1:] not in (b"", b"\n") else b""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "ab") as out:
        out.write(begin + json.dumps(asdict(token)).encode() + b"\n")
    return secret


def read_tokens(file: Path) -> tuple[Token, ...]:
    """Tokens of a file, one JSON object per line.

    Raises:
        UntrustedFileError: It is no regular file, too large, or others may write it.
        InputError: It cannot be read, or a line is no token.
    """
    try:
        lines = read_secret_file(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the token file {file}: {error}; make one with `token create`") from error
    return tuple(_token(file, number, line) for number, line in enumerate(lines, 1) if line.strip())


class TokenFile:
    """The tokens of a file as it is now: a line removed is a token revoked, without a restart.

    A file that cannot be trusted any more, see read_secret_file, changes nothing: the tokens read before stay in force.

    Raises:
        InputError: The file is not readable or not to be trusted, or holds no token.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stamp, self._tokens = self._changed(), read_tokens(file)
        if not self._tokens:
            raise InputError(f"{file} holds no token; make one with `teacher-service token create --file {file}`")

    def find(self, secret: str) -> Token | None:
        """The token whose hash it has."""
        self._reload()
        wanted, found = _sha256(secret), None
        for token in self._tokens:  # all of them: the time says nothing about which one, or whether any
            if hmac.compare_digest(token.sha256, wanted):
                found = token
        return found

    def _reload(self) -> None:
        stamp = self._changed()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tokens = read_tokens(self._file)
        except UntrustedFileError as error:
            _logger.error("the tokens read before stay in force: %s", error)  # noqa: TRY400
        except UserError as error:  # half written, or gone: all requests are refused until it is whole
            self._tokens = ()
            _logger.error("no token is accepted: %s", error)  # noqa: TRY400 - the message says it all

    def _changed(self) -> tuple[int, ...]:
        try:
            status = self._file.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _token(file: Path, number: int, line: str) -> Token:
    try:
        return _TOKEN.validate_json(line)
    except ValidationError:  # which shows the line: it may hold a secret
        raise InputError(
            f"line {number} of {file} is no token; remove it, and make tokens with `token create` only"
        ) from None


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
