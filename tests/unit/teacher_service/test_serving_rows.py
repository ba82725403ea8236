import asyncio
import json
import threading
from contextlib import closing

import numpy as np
import pytest
from anyio.to_thread import current_default_thread_limiter, run_sync
from safetensors.numpy import load
from served_store import COMMITTED_KEYS, QUARANTINED, UNCOMMITTED_UNIT, in_process, make_store
from starlette.requests import ClientDisconnect

from feature_store.format.addressing import RowId
from feature_store.read.blocks import blocks_sha256
from feature_store.store import open_store
from teacher_service.serve.config import Limits
from teacher_service.serve.responses import in_thread

SHARD = "taps/stage4/c/0/0/0/0"


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_swin):
    return open_store(make_store(tmp_path_factory.mktemp("rows"), tiny_swin))


@pytest.fixture(scope="module")
def ask(store):
    with closing(in_process(store.path)) as client:
        yield client


ROWS = [RowId(1, 1, 1), RowId(0, 0, 0), RowId(0, 3, 1), RowId(1, 1, 1)]


def assert_rows(answer, store, rows):
    arrays, strings = answer.frame()
    batch = store.source().read(rows)
    assert arrays["stage4"].tobytes() == batch.taps["stage4"].tobytes()
    assert arrays["stage4"].dtype == batch.taps["stage4"].dtype
    assert arrays["logits"].tobytes() == batch.logits.tobytes()
    assert arrays["rows"].tolist() == [list(row) for row in rows]
    assert strings["store"] == store.manifest.identity()


def test_batch_gives_rows_in_the_order_asked_when_shuffled_and_repeated(ask, store):
    answer = ask("/v1/rows:batch", "POST", json_body={"rows": ROWS})
    assert answer.headers["content-length"] == str(len(answer.body))
    assert_rows(answer, store, ROWS)


def test_batch_finds_rows_by_key_and_view_when_both_are_mixed(ask, store):
    answer = ask("/v1/rows:batch", "POST", json_body={"keys": [["u1-001", 1], ["u0-000", 0], ["u0-003", 1]]})
    assert_rows(answer, store, [RowId(1, 1, 1), RowId(0, 0, 0), RowId(0, 3, 1)])


def test_row_is_found_by_key_in_the_path(ask, store):
    assert_rows(ask("/v1/rows/u0-002?view=1"), store, [RowId(0, 2, 1)])
    assert_rows(ask("/v1/rows/u0%2D002"), store, [RowId(0, 2, 0)])


def test_rows_by_slashed_and_unicode_keys_are_found(serve, tmp_path, tiny_swin):
    from tiny_jobs import cache_config, noise_samples, write_tar

    from teacher_service.cache.job import cache

    samples = noise_samples("x", 2)
    for sample, key in zip(samples, ("class a/ünï", "%2e"), strict=True):
        sample["__key__"] = key
    cache(cache_config([write_tar(tmp_path / "0.tar", samples)], tiny_swin, tmp_path / "store"))
    ask = serve(tmp_path / "store")
    assert ask("/v1/rows/class%20a/%C3%BCn%C3%AF").frame()[0]["rows"].tolist() == [[0, 0, 0]]
    assert ask("/v1/rows/class%20a%2F%C3%BCn%C3%AF").frame()[0]["rows"].tolist() == [[0, 0, 0]]
    assert ask("/v1/rows/%252e").frame()[0]["rows"].tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(("tap_codec", "logits_codec"), [("int8", "top2"), ("int4+zstd", "bf16"), ("bf16", "f16")])
def test_codes_and_values_come_as_the_store_gives_them_for_any_codec(
    serve, tmp_path, tiny_swin, tap_codec, logits_codec
):
    path = make_store(tmp_path, tiny_swin, tap_codec=tap_codec, logits_codec=logits_codec)
    store, ask = open_store(path), serve(path)
    assert_rows(ask("/v1/rows:batch", "POST", json_body={"rows": ROWS}), store, ROWS)

    codes = ask("/v1/rows:batch", "POST", json_body={"rows": ROWS, "decode": False}).frame()[0]
    memory = store.source().buffers(len(ROWS))
    store.source().fill(np.array(ROWS), memory)
    assert codes.pop("rows").tolist() == [list(row) for row in ROWS]
    assert codes.keys() == memory.keys()
    for name, array in memory.items():
        assert (codes[name].dtype, codes[name].tobytes()) == (array.dtype, array.tobytes())


def test_unit_range_leaves_quarantined_positions_out(ask, store):
    assert_rows(ask("/v1/units/0/views/1"), store, [RowId(0, i, 1) for i in (0, 2, 3)])
    assert_rows(ask("/v1/units/0/views/1?start=1&count=2"), store, [RowId(0, 2, 1)])
    empty = ask("/v1/units/0/views/1?start=9").frame()[0]
    assert empty["stage4"].shape == (0, 4, 64)


def test_unit_range_is_not_sent_again_when_the_client_has_it(ask):
    first = ask("/v1/units/0/views/0?count=2")
    tag = first.headers["etag"]
    again = ask("/v1/units/0/views/0?count=2", headers={"If-None-Match": f'"other", W/{tag}'})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    others = ["/v1/units/0/views/1?count=2", "/v1/units/0/views/0?count=3", "/v1/units/0/views/0?count=2&decode=false"]
    assert tag not in [ask(other).headers["etag"] for other in others]


def test_blocks_are_a_safetensors_file_of_the_manifests_hash(ask, store):
    answer = ask("/v1/blocks")
    tensors, strings = load(answer.body), answer.frame()[1]
    assert blocks_sha256(tensors) == store.manifest.blocks_sha256 == strings["sha256"]
    assert json.loads(strings["split"])["family"] == "swin"
    assert ask("/v1/blocks", headers={"If-None-Match": answer.headers["etag"]}).status == 304


def test_manifest_says_what_is_there_and_what_may_be_asked_for(ask, store):
    described = ask("/v1/manifest").json()
    assert described["manifest"] == store.manifest.to_dict()
    assert described["identity"] == store.manifest.identity()
    assert described["committed"] == {"units": 2, "views": 4, "of_units": 3, "of_views": 6}
    assert described["row_bytes"] == store.source().row_bytes()
    assert described["live"] is False


@pytest.mark.parametrize(
    ("target", "status", "kind"),
    [
        (f"/v1/rows/{QUARANTINED}", 410, "quarantined"),
        ("/v1/rows/u2-000", 404, "unknown-key"),
        ("/v1/rows/", 422, "invalid-request"),
        ("/v1/rows/u0-000?view=7", 404, "uncommitted"),
        ("/v1/rows/u0-000?view=-1", 422, "invalid-request"),
        ("/v1/rows/u0-000?view=99999999999999999999", 422, "invalid-request"),
        ("/v1/rows/u0-000?taps=stage4,nose", 404, "unknown-tap"),
        (f"/v1/units/{UNCOMMITTED_UNIT}/views/0", 404, "uncommitted"),
        ("/v1/units/9/views/0", 404, "uncommitted"),
        ("/v1/units/0/views/9", 404, "uncommitted"),
        ("/v1/units/0/views/0?count=0", 422, "invalid-request"),
        ("/v1/units/zero/views/0", 422, "invalid-request"),
        ("/v1/nothing", 404, "not-found"),
        ("/v1/manifest/", 404, "not-found"),
    ],
)
def test_what_cannot_be_answered_is_a_problem_with_its_type(ask, target, status, kind):
    answer = ask(target)
    assert (answer.status, answer.problem) == (status, kind)


@pytest.mark.parametrize(
    ("asked", "status", "kind"),
    [
        ({"rows": [[0, 1, 0]]}, 410, "quarantined"),
        ({"rows": [[UNCOMMITTED_UNIT, 0, 0]]}, 404, "uncommitted"),
        ({"rows": [[0, 9, 0]]}, 404, "uncommitted"),
        ({"rows": [[9, 0, 0]]}, 404, "uncommitted"),
        ({"rows": [[True, 0, 0]]}, 422, "invalid-request"),
        ({"rows": [[2**70, 0, 0]]}, 422, "invalid-request"),
        ({"rows": [[0, 0]]}, 422, "invalid-request"),
        ({"rows": [["0", 0, 0]]}, 422, "invalid-request"),
        ({"rows": []}, 422, "invalid-request"),
        ({"rows": [[0, 0, 0]], "keys": [["u0-000", 0]]}, 422, "invalid-request"),
        ({"rows": [[0, 0, 0]], "bogus": 1}, 422, "invalid-request"),
        ({"rows": [[0, 0, 0]], "taps": ["nose"]}, 404, "unknown-tap"),
        ({"keys": [["\ud800", 0]]}, 422, "invalid-request"),
        ({"keys": [["no\0such", 0]]}, 404, "unknown-key"),
        ({"\ud800": 1}, 422, "invalid-request"),
        ({}, 422, "invalid-request"),
        ([], 422, "invalid-request"),
        ({"rows": [[0, 0, 0]] * 65}, 413, "too-large"),
    ],
)
def test_batch_that_cannot_be_answered_is_a_problem_with_its_type(serve, store, asked, status, kind):
    ask = serve(store.path, limits=Limits(max_rows=64))
    answer = ask("/v1/rows:batch", "POST", json_body=asked)
    assert (answer.status, answer.problem) == (status, kind)
    assert ask.memory_comes_back()


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"rows": [[1' + b"0" * 5000 + b", 0, 0]]}"])
def test_batch_of_no_json_is_a_problem(ask, body):
    answer = ask("/v1/rows:batch", "POST", {"content-type": "application/json"}, body)
    assert answer.status in (400, 422)
    assert answer.problem in ("malformed", "invalid-request")


JSON = {"content-type": "application/json"}
ENDLESS = "x" * 3_000_000
WRONG_BODIES = {
    "unknown names": b"{" + b",".join(b'"k%d":1' % i for i in range(300_000)) + b"}",
    "rows of strings": b'{"rows":[' + b",".join([b'["a","b","c"]'] * 60_000) + b"]}",
    "rows of strings at the end": b'{"rows":[' + b"[0,0,0]," * 60_000 + b",".join([b'["a"]'] * 5000) + b"]}",
    "keys of numbers": b'{"keys":[' + b",".join([b"[1,1]"] * 60_000) + b"]}",
    "one long name": json.dumps({ENDLESS: 1}).encode(),
    "names that escapes make longer": json.dumps({"\U0001f600" * 90 + str(i): 1 for i in range(2000)}).encode(),
    "one long key": json.dumps({"keys": [[ENDLESS, 0]]}).encode(),
    "one long tap": json.dumps({"rows": [[0, 0, 0]], "taps": [ENDLESS]}).encode(),
    "many taps": json.dumps({"rows": [[0, 0, 0]], "taps": ["stage9"] * 300_000}).encode(),
    "a key of no row": json.dumps({"keys": [["\x01\U0001f600" * 400, 0]]}).encode(),
    "deep": b'{"rows":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "many digits": b'{"rows":[[' + b"9" * 3_000_000 + b",0,0]]}",
    "no JSON": b'{"rows":[' + b"[0,0,0]," * 400_000,
}


@pytest.mark.parametrize("name", WRONG_BODIES)
def test_batch_is_answered_by_one_short_problem_when_much_of_it_is_wrong(serve, store, name):
    ask = serve(store.path, limits=Limits(max_rows=65_536))
    answer = ask("/v1/rows:batch", "POST", JSON, WRONG_BODIES[name])
    assert answer.problem in ("invalid-request", "malformed", "unknown-key"), answer
    assert len(answer.body) < 10_000
    assert len(answer.json().get("errors", [])) <= 10


def test_batch_problem_names_the_first_ten_errors_when_there_are_more(serve, store):
    ask = serve(store.path, limits=Limits(max_rows=65_536))
    rows = [[0, 0, 0]] * 3000 + [["a", 0, 0]] * 3000
    errors = ask("/v1/rows:batch", "POST", json_body={"rows": rows}).json()["errors"]
    assert [error["where"][-2] for error in errors] == [str(3000 + at) for at in range(10)]
    errors = ask("/v1/rows:batch", "POST", json_body={f"k{i}": 1 for i in range(50)}).json()["errors"]
    assert {error["where"][-1] for error in errors} <= {"rows", *(f"k{i}" for i in range(10))}
    assert len(errors) == 10


@pytest.mark.parametrize(
    "target",
    [
        f"/{'a' * 60_000}",
        f"/v1/rows/{'%01' * 1300}",
        f"/v1/rows/u0-000?{'%01' * 20_000}=1",
        f"/v1/zarr/{'%F0%9F%98%80' * 1000}",
        f"/v1/rows/u0-000?taps={'%01' * 256}",
        f"/v1/units/{'9' * 60_000}/views/0",
        f"/v1/rows/u0-000?view={'1' * 60_000}",
    ],
    ids=["path", "key", "parameter", "object", "taps", "unit", "view"],
)
def test_problem_is_short_when_what_was_asked_for_is_long(ask, target):
    answer = ask(target)
    assert answer.problem
    assert len(answer.body) < 10_000


@pytest.mark.parametrize(
    "asked",
    [{"keys": [["nothing", view] for view in range(65)]}, {"keys": [["u0-000", 0]] * 65}, {"rows": [["a", 0, 0]] * 65}],
)
def test_batch_of_too_many_rows_is_refused_before_they_are_looked_for(serve, store, asked):
    ask = serve(store.path, limits=Limits(max_rows=64))
    answer = ask("/v1/rows:batch", "POST", json_body=asked)
    assert (answer.status, answer.problem) == (413, "too-large")


def test_unit_range_is_refused_when_it_has_more_rows_than_one_answer(serve, store):
    ask = serve(store.path, limits=Limits(max_rows=3))
    assert ask("/v1/units/0/views/0?count=100").status == 200  # four positions, one of them quarantined
    ask = serve(store.path, limits=Limits(max_rows=2))
    assert ask("/v1/units/0/views/0?count=100").problem == "too-large"


def test_batch_looks_its_keys_up_once_when_each_has_another_view(serve, store, monkeypatch):
    ask = serve(store.path)
    lookups, rows = [], type(store).rows
    monkeypatch.setattr(
        type(store), "rows", lambda self, keys, view: lookups.append(len(keys)) or rows(self, keys, view)
    )
    answer = ask("/v1/rows:batch", "POST", json_body={"keys": [["u0-000", view] for view in range(64)]})
    assert answer.problem == "uncommitted"
    assert lookups == [64]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_batch_body_of_another_type_is_refused(ask, kind):
    answer = ask("/v1/rows:batch", "POST", {"content-type": kind} if kind else {}, json.dumps({"rows": ROWS}).encode())
    assert (answer.status, answer.problem) == (415, "unsupported-media-type")


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"])
def test_batch_body_is_taken_when_its_type_is_json(ask, store, kind):
    assert_rows(ask("/v1/rows:batch", "POST", {"content-type": kind}, json.dumps({"rows": ROWS}).encode()), store, ROWS)


def test_method_that_a_path_does_not_take_is_a_problem_that_names_those_it_does(ask):
    answer = ask("/v1/manifest", "DELETE")
    assert (answer.status, answer.problem, answer.headers["allow"]) == (405, "method-not-allowed", "GET")


def test_answer_larger_than_allowed_says_how_many_rows_fit(serve, store):
    row = store.source().row_bytes()
    ask = serve(store.path, limits=Limits(max_response_bytes=3 * row))
    answer = ask("/v1/rows:batch", "POST", json_body={"rows": [[0, 0, 0]] * 4})
    assert answer.problem == "too-large"
    assert "ask for 3" in answer.json()["detail"]
    assert ask("/v1/rows:batch", "POST", json_body={"rows": [[0, 0, 0]] * 3}).status == 200


def test_damaged_row_is_a_fault_of_the_service_and_never_data(serve, tmp_path, tiny_swin):
    path = make_store(tmp_path, tiny_swin)
    ask = serve(path)
    shard = path / "taps/stage4/c/0/0/0/0"
    raw = bytearray(shard.read_bytes())
    raw[3] ^= 1
    shard.write_bytes(raw)
    answer = ask("/v1/rows/u0-000")
    assert (answer.status, answer.problem) == (500, "corrupt-store")
    assert str(tmp_path) not in answer.body.decode()


def test_every_committed_row_is_served_and_no_memory_stays_taken(ask, store):
    for key in COMMITTED_KEYS:
        for view in (0, 1):
            assert_rows(ask(f"/v1/rows/{key}?view={view}"), store, store.rows([key], view))
    assert ask.memory_comes_back()


def test_rows_committed_later_are_served_after_a_refresh(serve, tmp_path, tiny_swin):
    path = make_store(tmp_path, tiny_swin)
    ask = serve(path)
    assert ask("/v1/rows/u2-000").status == 404
    tars = [str(tmp_path / f"{unit}.tar") for unit in range(3)]
    from tiny_jobs import cache_config

    from teacher_service.cache.job import cache

    cache(cache_config(tars, tiny_swin, path, views=2, policy="a2"))
    opened = ask.service.opened
    ask.service.load()
    assert ask.service.opened is not opened
    assert ask("/v1/rows/u2-000").frame()[0]["rows"].tolist() == [[2, 0, 0]]
    opened = ask.service.opened
    ask.service.load()
    assert ask.service.opened is opened


def test_decoded_values_are_float32_when_codes_are_not_values(serve, tmp_path, tiny_swin):
    ask = serve(make_store(tmp_path, tiny_swin, tap_codec="int8"))
    assert ask("/v1/rows/u0-000").frame()[0]["stage4"].dtype == np.float32
    assert ask("/v1/rows/u0-000?decode=false").frame()[0]["stage4"].dtype == np.int8


def test_head_is_answered_as_get_without_a_body_wherever_get_is(ask):
    paths = ["/", "/page.js", "/openapi.json"]
    for path, operations in ask.app.openapi()["paths"].items():
        if "get" in operations:
            paths.append(path.replace("{key}", "u0-000").replace("{path}", SHARD).replace("{unit}", "0"))
    for path in paths:
        target = path.replace("{view}", "0").replace("{position}", "0")
        get, head = ask(target), ask(target, "HEAD")
        assert (head.status, head.body) == (get.status, b""), target
        assert head.headers["content-type"] == get.headers["content-type"], target
        if target not in ("/metrics", "/v1/browse/activity"):  # their numbers grow
            assert head.headers["content-length"] == get.headers["content-length"], target
    assert ask("/v1/rows:batch", "HEAD").status == 405
    assert ask("/v1/rows/nothing", "HEAD").status == 404


def test_service_is_not_ready_and_advises_no_repair_when_its_store_is_gone(serve, tmp_path, tiny_swin):
    path = make_store(tmp_path, tiny_swin)
    ask = serve(path)
    assert ask("/readyz").status == 200
    path.rename(tmp_path / "elsewhere")
    targets = ["/readyz", "/v1/rows/u0-000", "/v1/units/0/views/0?decode=false", f"/v1/zarr/{SHARD}",
               "/v1/zarr/taps/stage4/zarr.json", "/v1/browse/units/0/views/0/rows/0"]  # fmt: skip
    for target in targets:
        answer = ask(target)
        assert (answer.status, answer.problem) == (503, "not-ready"), target
        assert "moved, removed or unmounted" in answer.json()["detail"]
        assert "drop" not in answer.body.decode()
        assert str(tmp_path) not in answer.body.decode()
    assert ask("/livez").status == 200
    (tmp_path / "elsewhere").rename(path)
    assert ask("/readyz").status == 200
    assert ask("/v1/rows/u0-000").status == 200


def test_service_is_not_ready_when_its_store_is_an_empty_mount_point(serve, tmp_path, tiny_swin):
    path = make_store(tmp_path, tiny_swin)
    ask = serve(path)
    path.rename(tmp_path / "elsewhere")
    path.mkdir()
    assert ask("/readyz").problem == "not-ready"
    (path / "zarr.json").write_bytes((tmp_path / "elsewhere/zarr.json").read_bytes())
    assert ask("/readyz").status == 200  # the store is there, and has lost an object
    assert ask(f"/v1/zarr/{SHARD}").problem == "object-missing"


def test_work_is_not_begun_when_its_client_leaves_while_it_waits_for_a_thread():
    async def main():
        free, begun = threading.Event(), []
        limiter = current_default_thread_limiter()
        busy = [asyncio.create_task(run_sync(free.wait)) for _ in range(int(limiter.total_tokens))]
        while limiter.available_tokens:
            await asyncio.sleep(0)

        async def leave():
            return {"type": "http.disconnect"}

        with pytest.raises(ClientDisconnect):
            await in_thread(leave, begun.append, 1)
        free.set()
        await asyncio.gather(*busy)
        assert await in_thread(leave, lambda: 2) == 2  # a thread was free
        return begun

    assert asyncio.run(main()) == []
