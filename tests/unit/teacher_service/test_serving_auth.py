import hmac
import json
import os
import socket
import stat
from contextlib import closing

import pytest
import timm
from served_store import in_process, make_store, make_tokens
from timm.data.config import resolve_model_data_config

from feature_store.client.connection import read_token
from feature_store.errors import InputError, MismatchError
from feature_store.teacher import model
from teacher_service.cli import main
from teacher_service.serve.app import create_app
from teacher_service.serve.config import ServeConfig
from teacher_service.serve.live.teacher import LiveTeacher
from teacher_service.serve.server import load_stored_teacher
from teacher_service.serve.service import Service
from teacher_service.serve.tokens import TokenFile, create_token, read_tokens

SCOPES = ("read", "compute", "admin")
PUBLIC = {"/livez", "/readyz"}


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_swin):
    return make_store(tmp_path_factory.mktemp("auth"), tiny_swin)


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens") / "tokens.jsonl"


@pytest.fixture(scope="module")
def secrets(token_file):
    return make_tokens(token_file)


@pytest.fixture(scope="module")
def guarded(store, token_file, secrets):
    """With every route there is, the live teacher's included."""
    with closing(in_process(store, tokens=token_file)) as client:
        service = Service(client.service.config, LiveTeacher(lambda: None))
        service._opened = client.service.opened
        client.service, client.app = service, create_app(service, TokenFile(token_file))
        yield client


def operations(client):
    """Method, path with examples filled in, and scope of everything the OpenAPI knows."""
    for path, found in client.app.openapi()["paths"].items():
        for method, operation in found.items():
            target = path.replace("{key}", "u0-000").replace("{path}", "zarr.json").replace("{unit}", "0")
            scopes = [scope for each in operation.get("security", []) for scope in each["token"]]
            yield method.upper(), target.replace("{view}", "0"), scopes[0] if scopes else None


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def test_every_route_but_the_probes_needs_a_token_with_its_scope(guarded, secrets):
    seen = set()
    for method, target, scope in operations(guarded):
        if scope is None:
            assert target in PUBLIC
            continue
        seen.add(scope)
        nobody = guarded(target, method)
        assert (nobody.status, nobody.problem) == (401, "unauthorized"), target
        assert nobody.headers["www-authenticate"].startswith("Bearer")
        for wrong in ("skc_wrong", secrets["read"][:-1], secrets["read"] + "a", "", "é"):
            assert guarded(target, method, bearer(wrong)).status == 401, target
        assert guarded(target, method, {"Authorization": f"Basic {secrets['admin']}"}).status == 401, target
        assert guarded(f"{target}?token={secrets['admin']}", method).status == 401, target
        for other in set(SCOPES) - {scope, "admin"}:
            refused = guarded(target, method, bearer(secrets[other]))
            assert (refused.status, refused.problem) == (403, "forbidden"), target
            assert f'scope="{scope}"' in refused.headers["www-authenticate"]
        for good in (scope, "admin"):
            assert guarded(target, method, bearer(secrets[good])).status not in (401, 403), target
    assert seen == {"read", "compute", "admin"}


@pytest.mark.parametrize(
    "target",
    ["/v1", "/v2/manifest", "/v1/manifest/", "//v1/manifest", "/V1/manifest", "/livez/", "/livez/x", "/readyz;x",
     "/livez%2f..%2fv1%2fmanifest", "/%2e%2e/livez", "/.well-known/x"],
)  # fmt: skip
def test_paths_nobody_thought_of_need_a_token_and_are_told_to_be_none(guarded, secrets, target):
    assert guarded(target).status == 401
    for scope in ("read", "compute"):
        answer = guarded(target, headers=bearer(secrets[scope]))
        assert (answer.status, answer.problem) == (404, "not-found")
        assert "is no part of the API; see openapi.json" in answer.json()["detail"]
    assert guarded(target, headers=bearer(secrets["admin"])).status == 404


def test_a_route_without_a_declaration_answers_an_admin_only(store, token_file, secrets):
    with closing(in_process(store, tokens=token_file)) as client:
        client.app.add_api_route("/forgotten", lambda: "secret")
        for headers in ({}, bearer(secrets["read"]), bearer(secrets["compute"])):
            answer = client("/forgotten", headers=headers)
            assert answer.status in (401, 404)
            assert b"secret" not in answer.body
        assert client("/forgotten", headers=bearer(secrets["admin"])).status == 200


def test_probes_answer_everybody_and_say_nothing_about_the_store(guarded, store):
    for path in PUBLIC:
        answer = guarded(path)
        assert answer.status in (200, 503)
        assert str(store) not in answer.body.decode()


def test_tokens_are_compared_by_hash_in_constant_time_and_all_of_them(token_file, secrets, monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    found = TokenFile(token_file).find(secrets["read"])
    assert found is not None
    assert found.name == "read"
    assert len(compared) == 3  # no early end at the first
    assert secrets["read"] not in repr(compared)


def test_a_token_is_revoked_by_removing_its_line(store, tmp_path, serve):
    file = tmp_path / "tokens.jsonl"
    first, second = create_token(file, "first", ("read",)), create_token(file, "second", ("read",))
    ask = serve(store, tokens=file)
    assert ask("/v1/manifest", headers=bearer(first)).status == 200
    lines = file.read_text().splitlines()
    file.write_text(lines[1] + "\n")
    assert ask("/v1/manifest", headers=bearer(first)).status == 401
    assert ask("/v1/manifest", headers=bearer(second)).status == 200
    file.write_text(lines[1] + "\nbroken\n")
    assert ask("/v1/manifest", headers=bearer(second)).status == 401
    file.unlink()
    assert ask("/v1/manifest", headers=bearer(second)).status == 401


def test_token_file_keeps_hashes_only_and_is_its_owners(tmp_path, capsys):
    file = tmp_path / "tokens.jsonl"
    assert main(["token", "create", "--name", "ada", "--scope", "read", "compute", "--file", str(file)]) == 0
    secret = capsys.readouterr().out.strip()
    assert len(secret) > 40
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (token,) = read_tokens(file)
    assert (token.name, token.scopes) == ("ada", ("read", "compute"))
    assert TokenFile(file).find(secret) == token
    assert main(["token", "create", "--name", "ada", "--file", str(file)]) == 2
    assert "has a token named 'ada'" in capsys.readouterr().err
    assert main(["token", "create", "--name", "a b", "--file", str(file)]) == 2
    assert len(read_tokens(file)) == 1
    missing = tmp_path / "nodir/t.jsonl"
    assert main(["token", "create", "--name", "ada", "--file", str(missing)]) == 2
    assert f"--file is {missing}, but there is no folder {missing.parent}" in capsys.readouterr().err


def test_a_token_is_made_on_its_own_line_when_the_last_one_was_left_without_its_end(tmp_path):
    file = tmp_path / "tokens.jsonl"
    create_token(file, "first", ("read",))
    file.write_text(file.read_text().rstrip("\n"))  # as editors do
    secret = create_token(file, "second", ("read",))
    assert [token.name for token in read_tokens(file)] == ["first", "second"]
    assert TokenFile(file).find(secret) is not None


@pytest.mark.parametrize(
    "line",
    ["x", "[]", "{}", json.dumps({"name": "a", "sha256": "0" * 63, "scopes": ["read"], "created": ""}),
     json.dumps({"name": "a", "sha256": "0" * 64, "scopes": ["root"], "created": ""})],
)  # fmt: skip
def test_token_file_with_a_bad_line_is_refused(tmp_path, line):
    file = tmp_path / "tokens.jsonl"
    create_token(file, "good", ("read",))
    with file.open("a") as out:
        out.write(line + "\n")
    with pytest.raises(InputError, match="line 2 of .* is no token"):
        TokenFile(file)


def test_token_file_without_tokens_is_refused(tmp_path):
    file = tmp_path / "tokens.jsonl"
    with pytest.raises(InputError, match="cannot read the token file"):
        TokenFile(file)
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no token"):
        TokenFile(file)


def replace_by_fifo(file):
    os.mkfifo(file)


def replace_by_socket(file):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(file))


def replace_by_a_huge_file(file):
    with file.open("wb") as out:
        out.truncate(1 << 40)
    file.chmod(0o600)


def replace_by_a_file_of_mode(mode):
    def replace_it(file):
        create_token(file, "intruder", ("admin",))
        file.chmod(mode)

    return replace_it


REPLACED = {
    "a FIFO": replace_by_fifo,
    "a link to a FIFO": lambda file: (os.mkfifo(f"{file}.fifo"), file.symlink_to(f"{file}.fifo")),
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
    "a link to a terminal": lambda file: file.symlink_to("/dev/tty"),
    "a folder": lambda file: file.mkdir(),
    "a socket": replace_by_socket,
    "a huge file": replace_by_a_huge_file,
    "a file for everybody": replace_by_a_file_of_mode(0o666),
    "a file of its group": replace_by_a_file_of_mode(0o660),
}


@pytest.mark.parametrize("what", REPLACED)
def test_tokens_stay_in_force_when_their_file_is_replaced_by_what_is_not_to_be_trusted(serve, store, tmp_path, what):
    file = tmp_path / "t"
    secret = create_token(file, "first", ("read",))
    ask = serve(store, tokens=file)
    file.unlink()
    REPLACED[what](file)
    assert ask("/v1/manifest", headers=bearer(secret)).status == 200
    assert ask("/livez").status == 200
    with pytest.raises(InputError, match=r"is no regular file|bytes, expected tokens|others may write it"):
        TokenFile(file)
    with pytest.raises(InputError, match=r"is no regular file|bytes, expected tokens|others may write it"):
        create_token(file, "second", ("read",))


def test_tokens_stay_in_force_when_their_file_is_replaced_by_another_users(serve, store, tmp_path, monkeypatch):
    file = tmp_path / "tokens.jsonl"
    first = create_token(file, "first", ("read",))
    ask = serve(store, tokens=file)
    second = create_token(file, "second", ("read",))
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    monkeypatch.setattr(os, "fstat", with_owner(os.fstat, user + 2))
    monkeypatch.setattr(os, "stat", with_owner(os.stat, user + 2))
    assert ask("/v1/manifest", headers=bearer(first)).status == 200
    assert ask("/v1/manifest", headers=bearer(second)).status == 401
    with pytest.raises(InputError, match=f"belongs to user {user + 2}, expected user {user + 1} or root"):
        TokenFile(file)


def with_owner(stat_of, owner):
    """A stat that gives every file to somebody."""

    def stat_it(*args, **kwargs):
        fields = list(stat_of(*args, **kwargs))
        fields[stat.ST_UID] = owner
        return os.stat_result(fields)

    return stat_it


def test_tokens_are_read_again_when_their_file_is_made_private_again(serve, store, tmp_path):
    file = tmp_path / "tokens.jsonl"
    first = create_token(file, "first", ("read",))
    ask = serve(store, tokens=file)
    second = create_token(file, "second", ("read",))
    file.chmod(0o666)
    assert ask("/v1/manifest", headers=bearer(second)).status == 401
    file.chmod(0o600)
    assert ask("/v1/manifest", headers=bearer(second)).status == 200
    assert ask("/v1/manifest", headers=bearer(first)).status == 200


def test_token_file_may_be_a_link_as_mounted_secrets_are(tmp_path):
    create_token(tmp_path / "real", "first", ("read",))
    (tmp_path / "link").symlink_to("real")
    assert TokenFile(tmp_path / "link").find("x") is None


def test_serve_refuses_a_token_file_that_others_may_write(tmp_path, store, capsys):
    file = tmp_path / "tokens.jsonl"
    create_token(file, "first", ("read",))
    file.chmod(0o622)
    assert main(["serve", "--store", str(store), "--tokens", str(file), "--port", "0"]) == 2
    assert "has mode 0622: others may write it; run `chmod go-w`" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["a FIFO", "a link to a device", "a folder", "a huge file", "a file for everybody"])
def test_clients_token_file_is_refused_when_it_cannot_be_trusted(tmp_path, what):
    REPLACED[what](tmp_path / "t")
    with pytest.raises(InputError, match=r"is no regular file|bytes, expected tokens|others may write it"):
        read_token(tmp_path / "t")


def test_clients_token_file_may_be_its_groups(tmp_path):
    (tmp_path / "t").write_text("skc_x\n")
    (tmp_path / "t").chmod(0o664)
    assert read_token(tmp_path / "t") == "skc_x"


HOSTS = {
    "none": [], "two": ["localhost", "localhost"], "two that differ": ["localhost", "evil.example"],
    "two in one": ["localhost, evil.example"], "a path": ["localhost/x"], "a user": ["x@localhost"],
    "a space": ["local host"], "a query": ["localhost?x"], "no ASCII": ["l\u00f6calhost"],
}  # fmt: skip


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize("target", ["/v1/manifest", "/livez", "/", "/nothing"])
@pytest.mark.parametrize("with_tokens", [False, True])
def test_host_that_is_missing_doubled_or_malformed_is_refused(
    serve, store, token_file, secrets, hosts, target, with_tokens
):
    ask = serve(store, tokens=token_file if with_tokens else None)
    headers = [("host", host) for host in hosts] + [("authorization", f"Bearer {secrets['admin']}")]
    answer = ask(target, headers=headers)
    assert (answer.status, answer.problem) == (400, "malformed")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_listening_beyond_loopback_needs_tokens_or_a_flag(tmp_path, host):
    with pytest.raises(InputError, match="open to other machines and there are no tokens"):
        ServeConfig(store="s", host=host)
    assert not ServeConfig(store="s", host=host, allow_anonymous=True).loopback
    assert not ServeConfig(store="s", host=host, tokens=tmp_path).loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_listening_on_loopback_needs_no_tokens(host):
    assert ServeConfig(store="s", host=host).loopback


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2, "teacher": "t"}, "one service per GPU with --device cuda:N"),
        ({"checkpoint": "c"}, "--checkpoint without --teacher"),
        ({"tls_cert": "c"}, "belong together"),
        ({"port": 70000}, "--port is 70000"),
        ({"allow_anonymous": True, "tokens": "t"}, "contradict each other"),
        *(
            ({"cors_origins": (origin,)}, "--cors-origins is")
            for origin in (
                "*",
                "lab.example.org",
                "https://",
                "https://Lab.example.org",
                "https://lab.example.org/",
                "null",
            )
        ),
    ],
)
def test_services_nobody_should_run_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ServeConfig(store="s", **options)


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8000", 200), ("localhost", 200), ("[::1]:80", 200), ("evil.example", 421), ("evil.example:8000", 421),
     ("127.0.0.1.evil.example", 421), ("localhost.evil.example", 421), ("", 421), ("[::1", 421), ("10.0.0.1", 421)],
)  # fmt: skip
def test_without_tokens_only_local_names_are_answered(serve, store, host, status):
    """A page in a local browser may reach loopback under its own name (DNS rebinding)."""
    assert serve(store)("/v1/manifest", headers={"Host": host}).status == status


def test_browsers_of_other_origins_are_allowed_nothing(serve, store):
    ask = serve(store)
    answer = ask("/v1/manifest", headers={"Origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = ask(
        "/v1/rows:batch", "OPTIONS", {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status == 405


def test_live_teacher_that_is_not_the_stores_is_refused(tmp_path, store, tiny_swin, other_swin):
    good = ServeConfig(store=str(store), teacher=tiny_swin.name, checkpoint=tiny_swin.checkpoint, device="cpu")
    assert load_stored_teacher(good).info.name == tiny_swin.name
    other = ServeConfig(store=str(store), teacher=other_swin.name, checkpoint=other_swin.checkpoint, device="cpu")
    with pytest.raises(MismatchError, match=r"teacher\.weights_sha256 differs"):
        load_stored_teacher(other)


def test_live_teacher_that_sees_pixels_otherwise_than_the_stores_is_refused(store, tiny_swin, monkeypatch):
    """As of another release of timm, which may change what a name's pixels are normalised by."""
    good = ServeConfig(store=str(store), teacher=tiny_swin.name, checkpoint=tiny_swin.checkpoint, device="cpu")
    data = resolve_model_data_config(timm.create_model(tiny_swin.name))
    monkeypatch.setattr(model, "resolve_model_data_config", lambda _: {**data, "mean": (0.0, 0.0, 0.0)})
    with pytest.raises(MismatchError, match=r"teacher\.mean differs"):
        load_stored_teacher(good)


def test_browsers_of_named_origins_may_read_with_a_token_and_no_others(serve, store, token_file, secrets):
    ask = serve(store, tokens=token_file, cors_origins=("https://lab.example.org",))
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = ask("/v1/rows:batch", "OPTIONS", {"Origin": "https://lab.example.org", **wanted})
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == "https://lab.example.org"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    for headers, status in ((bearer(secrets["read"]), 200), ({}, 401)):
        answer = ask("/v1/manifest", headers={"Origin": "https://lab.example.org", **headers})
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == "https://lab.example.org"
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
        assert "access-control-allow-credentials" not in answer.headers
    for other in ("https://evil.example", "https://lab.example.org.evil.example", "http://lab.example.org", "null"):
        assert ask("/v1/rows:batch", "OPTIONS", {"Origin": other, **wanted}).status == 400
        answer = ask("/v1/manifest", headers={"Origin": other, **bearer(secrets["read"])})
        assert "access-control-allow-origin" not in answer.headers
