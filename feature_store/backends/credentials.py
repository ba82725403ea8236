"""Credentials, regions, endpoints of stores that are not local."""

import os
import re
from pathlib import Path
from typing import Any

from feature_store.errors import InputError

S3_VARIABLES = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), or AWS_PROFILE for a profile of ~/.aws; "
    "for a public bucket AWS_SKIP_SIGNATURE=true"
)
TOKEN_VARIABLE = "FEATURE_STORE_TOKEN"
SERVED = "/v1/zarr"
"""Path of a store's objects below a service's URL."""

_WEB_SERVER = (
    f"check the URL; a service's store ends with {SERVED} and needs a token in {TOKEN_VARIABLE}; for a private bucket "
    "use its own URL"
)
_REMEDIES = {
    "s3": S3_VARIABLES,
    "gs": "set GOOGLE_SERVICE_ACCOUNT to a service account's key file; for a public bucket GOOGLE_SKIP_SIGNATURE=true",
    "http": _WEB_SERVER,
    "https": _WEB_SERVER,
}
_REQUEST = re.compile(r"(?:for path \S*: )?Error performing [A-Z]+ (\S+) in .*? - ")
_STATUS = re.compile(r"Server returned non-2xx status code: (\d+ \w[\w ]*): *$")
_S3_REASON = re.compile(r"<Code>(.*?)</Code>(?:.*?<Message>(.*?)</Message>)?", re.DOTALL)
_INSTANCE_METADATA = ("169.254.", "metadata.google.internal", "[fd00:ec2")


def s3_options(url: str) -> dict[str, Any]:
    """Keyword arguments for obstore's S3 store: from the environment, else as AWS's own tools read ~/.aws.

    Raises:
        InputError: There are no credentials, or the profile has none that work.
    """
    endpoint = s3_endpoint()
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    given = os.environ.get("AWS_ACCESS_KEY_ID") and not os.environ.get("AWS_PROFILE")
    public = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on")
    if (given and (region or endpoint)) or public:
        return {"region": region or "us-east-1", **options}
    try:
        import boto3
        import botocore.exceptions
        import botocore.session
    except ImportError as error:
        if given or not _has_profiles():
            return {"region": region or "us-east-1", **options}
        raise InputError(
            f"cannot open {url}: profiles of ~/.aws are read by boto3, which is not installed; pip install "
            f"'scalekd-cache[s3]', or {S3_VARIABLES}"
        ) from error
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        core = botocore.session.Session()
        session = boto3.Session(botocore_session=core)
        region = session.region_name or "us-east-1"
        config = core.get_scoped_config()
        if not endpoint and ("endpoint_url" in config or "services" in config):
            options["endpoint"] = session.client("s3", region_name=region).meta.endpoint_url
        if session.get_credentials() is None:
            raise InputError(f"cannot open {url}: there are no S3 credentials; {S3_VARIABLES}")
        provider = Boto3CredentialProvider(session)
        provider()  # a login that has expired is said here, not by the first request
    except botocore.exceptions.BotoCoreError as error:
        raise InputError(f"cannot open {url}: {error}; {S3_VARIABLES}") from error
    return {"region": region, **options, "credential_provider": provider}


def bearer_headers(url: str) -> dict[str, str]:
    """Headers with the token of a service's store; none for other web servers, which the token is not for."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    return {"Authorization": f"Bearer {token}"} if token and url.endswith(SERVED) else {}


def s3_endpoint() -> str:
    """The address of S3 in the environment; empty for AWS's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _has_profiles() -> bool:
    variables = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
    files = (Path(os.environ.get(name) or f"~/.aws/{file}").expanduser() for name, file in variables.items())
    return bool(os.environ.get("AWS_PROFILE")) or any(file.is_file() for file in files)


def failure(url: str, error: BaseException, *, denied: bool) -> str:
    """Why a request to a bucket or web server failed, and what to set; without addresses the user never gave.

    Args:
        url: URL from the user.
        error: obstore's error, whose first line has the request and the server's answer.
        denied: Whether the server refused the credentials.
    """
    scheme = url.partition("://")[0]
    text = str(error).strip().partition("\n\n")[0]
    request = _REQUEST.search(text)
    if request is not None and any(host in request[1] for host in _INSTANCE_METADATA):
        return f"there are no credentials, and this machine has no role to take them from; {_REMEDIES[scheme]}"
    reason = _REQUEST.sub("", text).removeprefix("Generic S3 error: ").partition("\n")[0]
    if found := _S3_REASON.search(text) or _STATUS.search(reason):
        reason = ": ".join(part for part in found.groups() if part)
    if denied:
        return f"access denied ({reason}); the credentials are wrong, expired or not enough: {_REMEDIES[scheme]}"
    endpoint = f", AWS_REGION and the endpoint {s3_endpoint() or 'of AWS'} (AWS_ENDPOINT_URL)" if scheme == "s3" else ""
    return f"{reason}; check network, credentials, URL{endpoint}"
