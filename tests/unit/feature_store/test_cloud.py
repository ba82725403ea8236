"""S3 credentials, regions and endpoints as AWS's own tools read them; errors that name what to set."""

import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from servers import s3_server

from feature_store.backends.bucket import RemoteObjects
from feature_store.backends.credentials import failure
from feature_store.errors import InputError, ResourceError

KEYS = "aws_access_key_id = key\naws_secret_access_key = secret\n"


@pytest.fixture(scope="module")
def bucket():
    with s3_server() as new_bucket:
        yield new_bucket(), os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and no variable of AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / ".aws").mkdir()
    return tmp_path / ".aws"


def test_bucket_opens_when_credentials_are_in_the_default_profile(bucket, home, monkeypatch):
    url, endpoint = bucket
    (home / "credentials").write_text(f"[default]\n{KEYS}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    objects = RemoteObjects(f"{url}/default")
    objects.put("a", b"bytes")
    assert objects.get("a").tobytes() == b"bytes"


@pytest.mark.parametrize("settings", ["endpoint_url = {endpoint}", "services = local"])
def test_bucket_opens_when_a_profile_names_region_and_endpoint(bucket, home, monkeypatch, settings):
    url, endpoint = bucket
    (home / "credentials").write_text(f"[team]\n{KEYS}")
    (home / "config").write_text(
        f"[profile team]\nregion = eu-west-1\n{settings.format(endpoint=endpoint)}\n"
        f"[services local]\ns3 =\n  endpoint_url = {endpoint}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "team")
    objects = RemoteObjects(f"{url}/{settings[:8]}")
    objects.put("a", b"bytes", new=True)
    assert objects.list() == ["a"]


def test_bucket_opens_when_credentials_are_in_the_environment(bucket, home, monkeypatch):
    url, endpoint = bucket
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "ENDPOINT_URL_S3": endpoint}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setitem(sys.modules, "boto3", None)
    RemoteObjects(f"{url}/environment").put("a", b"bytes")


def test_bucket_is_refused_and_the_variables_are_named_when_there_are_no_credentials(home):
    with pytest.raises(InputError, match=r"s3://somewhere: there are no S3 .* set AWS_ACCESS_KEY_ID .* AWS_PROFILE"):
        RemoteObjects("s3://somewhere").get("a")


def test_bucket_is_refused_when_the_profile_is_unknown(home, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(InputError, match=r"s3://somewhere: .*profile \(nobody\) could not be found; set AWS_"):
        RemoteObjects("s3://somewhere").get("a")


def test_bucket_is_refused_with_what_to_install_when_profiles_cannot_be_read(home, monkeypatch):
    (home / "credentials").write_text(f"[default]\n{KEYS}")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(InputError, match=r"boto3, which is not installed; pip install 'scalekd-cache\[s3\]', or set"):
        RemoteObjects("s3://somewhere").get("a")


@pytest.fixture
def answering(home, monkeypatch):
    """An S3 that answers everything in one way."""
    answer = {}

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.do_GET()

        def do_GET(self):
            body = "<Error><Code>{code}</Code><Message>{message}</Message></Error>".format(**answer).encode()
            self.send_response(answer["status"])
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
        yield answer
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "AccessDenied"])
def test_error_names_the_users_address_and_what_to_set_when_credentials_are_refused(answering, code):
    answering.update(status=403, code=code, message="no")
    objects = RemoteObjects("s3://bucket1/store")
    with pytest.raises(
        ResourceError, match=rf"^s3://bucket1/store/a: access denied \({code}: no\); .*AWS_PROFILE"
    ) as put:
        objects.put("a", b"bytes")
    with pytest.raises(ResourceError, match=r"^s3://bucket1/store/a: access denied \(403 Forbidden\)"):
        objects.size("a")
    assert "/bucket1/store/a in" not in str(put.value)


def test_error_names_region_and_endpoint_when_the_region_is_wrong(answering):
    answering.update(status=400, code="AuthorizationHeaderMalformed", message="the region is wrong")
    expected = (
        r"^s3://bucket1/a: AuthorizationHeaderMalformed: the region is wrong; .*AWS_REGION and the endpoint http://127"
    )
    with pytest.raises(ResourceError, match=expected):
        RemoteObjects("s3://bucket1").put("a", b"bytes")


def test_put_says_so_when_there_is_no_such_bucket(answering):
    answering.update(status=404, code="NoSuchBucket", message="none")
    with pytest.raises(InputError, match="s3://bucket1/store: there is no such bucket"):
        RemoteObjects("s3://bucket1/store").put("a", b"bytes")


@pytest.mark.parametrize(
    ("url", "address", "variable"),
    [("s3://b", "http://169.254.169.254/latest/api/token", "AWS_ACCESS_KEY_ID"),
     ("gs://b", "http://metadata.google.internal/computeMetadata/v1/x", "GOOGLE_SERVICE_ACCOUNT")],
)  # fmt: skip
def test_failure_speaks_of_credentials_when_the_machine_has_no_role(url, address, variable):
    error = OSError(
        f"Generic S3 error: Error performing PUT {address} in 2.1s, after 3 retries - HTTP error: timed out"
    )
    text = failure(url, error, denied=False)
    assert text.startswith("there are no credentials")
    assert variable in text
    assert address not in text
