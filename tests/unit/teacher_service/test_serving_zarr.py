import asyncio
import os
import time
from contextlib import closing
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from served_store import UNCOMMITTED_UNIT, in_process, make_store, make_tokens

from feature_store.commits.index import PATH as INDEX
from feature_store.commits.index import decode_index
from feature_store.read.blocks import read_blocks
from feature_store.store import open_store
from teacher_service.serve.config import Limits
from teacher_service.serve.routes import zarr as routes_zarr

SECRET = b"the secret that is not served"
SHARD = "taps/stage4/c/0/0/0/0"


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_swin):
    """A store with secrets beside, above and in it."""
    path = make_store(tmp_path_factory.mktemp("zarr"), tiny_swin)
    for file in (path.parent / "secret", path / "secret", path / "taps/secret.txt", path / ".locks/u00000",
                 path / "taps/stage4/c/0/0/0/0.1-2.partial", path / "taps/stage4/c/0/7/0/0"):  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(SECRET)
    (path / "linked").mkdir()
    (path / "linked/zarr.json").symlink_to(path.parent / "secret")
    (path / "folder").symlink_to(path.parent)
    (path.parent / "zarr.json").write_bytes(SECRET)
    os.mkfifo(path / "linked/c")
    return path


@pytest.fixture(scope="module")
def ask(store):
    with closing(in_process(store)) as client:
        yield client


def get(ask, path, method="GET", **headers):
    return ask(f"/v1/zarr/{path}", method, {name.replace("_", "-"): value for name, value in headers.items()})


def test_every_committed_object_is_served_as_it_is(ask, store):
    opened = open_store(store)
    paths = {path for record in opened.committed.records for path in record.objects}
    assert len(paths) > 20
    for path in [*sorted(paths), "zarr.json", "taps/stage4/zarr.json", "teacher/blocks/zarr.json"]:
        answer = get(ask, path)
        assert (answer.status, answer.body) == (200, (store / path).read_bytes()), path
        head = get(ask, path, "HEAD")
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(answer.body)))
        assert head.headers["etag"] == answer.headers["etag"]


def test_blocks_are_read_for_one_request_at_a_time(serve, store, monkeypatch):
    """Before they are read nobody knows what they take of the limit."""
    client, reading, together = serve(store), [], []

    def watched(objects):
        reading.append(objects)
        together.append(len(reading))
        time.sleep(0.02)
        reading.pop()
        return read_blocks(objects)

    async def several():
        return await asyncio.gather(*(client.ask("/v1/blocks", "GET", {}, b"") for _ in range(5)))

    monkeypatch.setattr(routes_zarr, "read_blocks", watched)
    answers = asyncio.run(several())
    assert together == [1] * 5
    assert all(answer.status == 200 and answer.body == answers[0].body for answer in answers)


def test_blocks_objects_are_served_too(ask, store):
    names = [path.relative_to(store).as_posix() for path in (store / "teacher/blocks").rglob("*") if path.is_file()]
    assert len(names) > 5
    for name in names:
        assert get(ask, name).body == (store / name).read_bytes()


def test_what_is_not_committed_is_not_there_though_its_file_is(ask, store):
    for path in (f"taps/stage4/c/0/{UNCOMMITTED_UNIT}/0/0", f"label/c/{UNCOMMITTED_UNIT}", "taps/stage4/c/0/7/0/0"):
        assert get(ask, path).problem == "not-found", path
    assert (store / f"taps/stage4/c/0/{UNCOMMITTED_UNIT}/0/0").exists()


def test_a_missing_committed_object_is_gone_and_never_just_not_found(tmp_path, tiny_swin, serve):
    path = make_store(tmp_path, tiny_swin)
    ask = serve(path)
    (path / SHARD).unlink()
    answer = get(ask, SHARD)
    assert (answer.status, answer.problem) == (410, "object-missing")
    (path / SHARD).symlink_to(tmp_path / "0.tar")
    assert get(ask, SHARD).status == 410
    (path / SHARD).unlink()
    (path / SHARD).write_bytes(b"cut")
    assert get(ask, SHARD).problem == "corrupt-store"


def test_tags_follow_content_and_not_place_or_time(tmp_path, tiny_swin, serve, store, ask):
    other = make_store(tmp_path, tiny_swin)
    again = serve(other)
    for path in (SHARD, "taps/stage4/c/1/0/0/0", "label/c/0", "zarr.json"):
        assert get(ask, path).headers["etag"] == get(again, path).headers["etag"]
    shards = [f"taps/stage4/c/{view}/{unit}/0/0" for view in (0, 1) for unit in (0, 1)]
    assert len({get(ask, path).headers["etag"] for path in shards}) == 4


def test_conditions_are_kept_as_the_standard_has_them(ask, store):
    whole = (store / SHARD).read_bytes()
    tag = get(ask, SHARD).headers["etag"]
    assert get(ask, SHARD, If_None_Match=tag).status == 304
    assert get(ask, SHARD, "HEAD", If_None_Match="*").status == 304
    assert get(ask, SHARD, If_None_Match='"other"').status == 200
    assert get(ask, SHARD, If_Match='"other"').problem == "precondition-failed"
    assert get(ask, SHARD, If_Match=f'"other", {tag}').status == 200
    assert get(ask, SHARD, Range="bytes=0-3", If_Range=tag).body == whole[:4]
    assert get(ask, SHARD, Range="bytes=0-3", If_Range='"other"').body == whole


@pytest.mark.parametrize(
    ("header", "span"),
    [("bytes=0-0", (0, 1)), ("bytes=5-", (5, None)), ("bytes=-4", (-4, None)), ("bytes=-999999", (0, None)),
     ("bytes=3-999999", (3, None)), (" bytes=1-2 ", (1, 3))],
)  # fmt: skip
def test_range_gives_those_bytes(ask, store, header, span):
    whole = (store / SHARD).read_bytes()
    answer = get(ask, SHARD, Range=header)
    assert (answer.status, answer.body) == (206, whole[slice(*span)])
    start = slice(*span).indices(len(whole))[0]
    assert answer.headers["content-range"] == f"bytes {start}-{start + len(answer.body) - 1}/{len(whole)}"


@pytest.mark.parametrize("header", ["bytes=999999-", "bytes=999999-999999999", "bytes=-0", "bytes=999999999999999999-"])
def test_range_past_the_end_is_not_satisfiable(ask, store, header):
    answer = get(ask, SHARD, Range=header)
    assert (answer.status, answer.problem) == (416, "range-not-satisfiable")
    assert answer.headers["content-range"] == f"bytes */{(store / SHARD).stat().st_size}"


@pytest.mark.parametrize(
    "header", ["bytes=0-1,3-4", "rows=0-1", "bytes=4-2", "bytes=-", "bytes", "", "bytes=٣-٤", "bytes=a-b"]
)
def test_range_that_is_none_is_ignored(ask, store, header):
    header = header.encode().decode("latin-1")
    answer = get(ask, SHARD, Range=header)
    assert (answer.status, len(answer.body)) == (200, (store / SHARD).stat().st_size)


def test_large_object_comes_in_pieces_and_takes_little_memory(tmp_path, tiny_swin, serve, monkeypatch):
    monkeypatch.setattr("teacher_service.serve.routes.zarr._PIECE", 1000)
    path = make_store(tmp_path, tiny_swin)
    ask = serve(path, limits=Limits(max_response_bytes=3000, max_bytes_in_flight=3000))
    assert get(ask, SHARD).body == (path / SHARD).read_bytes()
    assert ask.memory_comes_back()


def test_commit_index_is_made_from_what_is_open_so_that_readers_without_listing_can_open(ask, store):
    answer = get(ask, INDEX)
    opened = open_store(store)
    index = decode_index(answer.body, opened.layout)
    assert index.paths() == [record.path for record in opened.committed.records]
    assert len(index) == 2  # not the one whose record is gone, which the store's own index still has
    assert get(ask, INDEX, If_None_Match=answer.headers["etag"]).status == 304


HOSTILE = r"""
.. . / // \ %2e%2e %2E%2E%2F %252e%252e%252f ..%2f %5c ..%5c %00 ~ secret zarr.json taps stage4 c 0 linked folder
store.zarr .locks u00000 etc/passwd %c0%ae%c0%ae %uff0e commits index 0.1-2.partial %ef%bc%8f ..; %20 : C: file:// ?x #
"""
PIECES = st.sampled_from([*HOSTILE.split(), "", "\0"])
PATHS = st.one_of(
    st.lists(PIECES, min_size=1, max_size=8).map("/".join),
    st.lists(PIECES, min_size=1, max_size=8).map("".join),
    st.text(st.characters(codec="utf-8"), max_size=40).map(quote),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PATHS)
@example("../secret")
@example("%2e%2e/secret")
@example("/etc/passwd")
@example("folder/zarr.json")
@example("linked/zarr.json")
@example("linked/c")
@example("taps/secret.txt")
@example("secret")
def test_no_path_leaks_what_is_not_the_stores(ask, path):
    answer = get(ask, path.encode("ascii", "ignore").decode())
    assert answer.status in (200, 400, 404, 410, 422)
    assert SECRET not in answer.body
    assert b"root:" not in answer.body
    if answer.status != 200:
        assert answer.problem


RANGES = st.one_of(
    st.from_regex(r"bytes=[0-9]{0,20}-[0-9]{0,20}(,[0-9]{0,3}-[0-9]{0,3}){0,3}", fullmatch=True),
    st.from_regex(r"[a-z]{0,6} ?= ?-?[0-9a-f]{0,9}-[0-9-]{0,9}", fullmatch=True),
    st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RANGES, st.sampled_from([SHARD, "zarr.json", "label/c/0"]))
def test_no_range_gives_other_bytes_than_it_says(ask, store, header, path):
    whole = (store / path).read_bytes()
    answer = get(ask, path, Range=header)
    if answer.status == 206:
        start, _, end = answer.headers["content-range"].removeprefix("bytes ").partition("/")[0].partition("-")
        assert answer.body == whole[int(start) : int(end) + 1] != b""
    elif answer.status == 200:
        assert answer.body == whole
    else:
        assert (answer.status, answer.problem) == (416, "range-not-satisfiable")


def test_no_token_opens_a_path_of_another_scope(store, tmp_path, serve):
    secrets = make_tokens(tmp_path / "tokens.jsonl")
    ask = serve(store, tokens=tmp_path / "tokens.jsonl")
    headers = {"Authorization": f"Bearer {secrets['compute']}"}
    for target in ("/v1/zarr/zarr.json", "/v1/zarr/../zarr/zarr.json", "/v1/zarr/..%2f..%2flivez", "/v1/zarr//livez"):
        assert ask(target, headers=headers).status == 403
