"""HTTP sources are FeatureSources like any other, and give what the store and the teacher give, to the bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from app_transport import AppTransport, service_app
from conformance import ROWS, FeatureSourceConformance
from fastapi import FastAPI
from training_world import World, make_world, shared_world

from feature_store.client.connection import Client, connect
from feature_store.client.service import RetryPolicy
from feature_store.errors import CorruptStoreError, InputError, MismatchError, QuarantinedError, UncommittedError
from feature_store.format.addressing import RowId
from feature_store.inputs.tar import open_tars
from feature_store.store import open_store
from feature_store.teacher.model import Teacher, load_teacher
from feature_store.views import view_policy
from student_trainer.data.batch import ViewDataset, match_tars, training_positions
from student_trainer.data.replayed import StoredViews
from teacher_service.serve.config import Limits

NO_RETRY = RetryPolicy(deadline=0.0)


@pytest.fixture(scope="module")
def world() -> World:
    return shared_world("vit")


@pytest.fixture(scope="module")
def teacher(world) -> Teacher:
    name, kwargs = world.teacher
    return load_teacher(name, checkpoint=world.checkpoint, model_kwargs=kwargs)


@pytest.fixture(scope="module")
def dataset(world) -> ViewDataset:
    store = open_store(world.store)
    return ViewDataset(match_tars(store, open_tars(world.tars)), StoredViews(store))


@pytest.fixture
def views(dataset):
    return lambda rows: dataset[rows].pixels.numpy()


@pytest.fixture(scope="module")
def transport(world, teacher) -> AppTransport:
    return AppTransport(service_app(world.store, teacher))


@pytest.fixture
def client(transport) -> Client:
    return connect(transport.url, transport=transport, retry=NO_RETRY)


class TestHttpSource(FeatureSourceConformance):
    relative_error = 2.0**-10  # float16 taps

    @pytest.fixture
    def source(self, client):
        return client.source()

    def test_read_of_nothing_gives_an_empty_batch(self, source, client):
        batch = source.read([])
        assert (batch.rows.shape, len(batch.logits), len(batch.taps["stage4"])) == ((0, 3), 0, 0)
        assert client.rows([])["rows"].shape == (0, 3)

    def test_read_is_refused_when_a_row_is_not_committed_or_quarantined(self, source):
        with pytest.raises(UncommittedError, match="view 2 of unit 0"):
            source.read([RowId(0, 0, 2)])
        with pytest.raises(QuarantinedError, match="was quarantined"):
            source.read([RowId(0, 9, 0)])


class TestRemoteLiveSource(FeatureSourceConformance):
    @pytest.fixture
    def source(self, client, dataset):
        units = training_positions(dataset.tars, store=client.store)

        def unit_views(unit, view, batch_size):
            for start in range(0, len(units[unit]), batch_size):
                rows = [RowId(unit, int(at), view) for at in units[unit][start : start + batch_size]]
                yield rows, dataset[rows].pixels.numpy()

        return client.live(views=unit_views)

    def test_read_is_refused_when_pixels_are_missing_or_too_few(self, source, views):
        with pytest.raises(InputError, match="a live source needs the rows' pixels"):
            source.read(ROWS)
        with pytest.raises(InputError, match="got pixels of 4 views for 5 rows"):
            source.read(ROWS, pixels=views(ROWS)[:4])

    def test_iter_unit_is_refused_when_it_cannot_make_views(self, client):
        with pytest.raises(InputError, match="cannot make whole units' views"):
            next(client.live().iter_unit(0, 0))

    def test_views_are_sent_in_pieces_when_they_are_more_than_a_batch(self, source, views, transport):
        rows = [RowId(0, i % 9, 0) for i in range(19)]
        before = len(transport.asked)
        batch = source.read(rows, pixels=views(rows))
        assert len(transport.asked) - before == 3  # of 8, 8 and 3
        assert batch.logits.shape == (19, 4)
        np.testing.assert_allclose(batch.logits[0], batch.logits[9], rtol=1e-3, atol=1e-4)
        assert source.seconds > 0

    def test_half_precision_is_sent_when_asked_for(self, client, views):
        batch = client.live(["stage4"], precision="f16").read(ROWS, pixels=views(ROWS))
        assert batch.taps["stage4"].dtype == np.float16
        assert batch.taps.keys() == {"stage4"}


@pytest.mark.parametrize("codec", ["f16", "f32", "int8", "int4+zstd"])
def test_rows_are_the_stores_to_the_bit_when_read_over_http(tmp_path, codec):
    world = shared_world("vit") if codec == "f16" else make_world(tmp_path, codec="f32")
    if codec in ("int8", "int4+zstd"):
        world = coded_world(tmp_path / codec, codec)
    local = open_store(world.store).source()
    transport = AppTransport(service_app(world.store))
    remote = connect(transport.url, transport=transport).source()
    got, expected = remote.read(ROWS), local.read(ROWS)
    for name, tap in expected.taps.items():
        assert got.taps[name].dtype == tap.dtype
        np.testing.assert_array_equal(got.taps[name], tap)
    np.testing.assert_array_equal(got.logits, expected.logits)
    got, expected = remote.read(ROWS, decode=False), local.read(ROWS, decode=False)
    assert got.taps == expected.taps == {}
    for name, parts in expected.encoded.items():
        assert got.encoded[name].keys() == parts.keys()
        for suffix, part in parts.items():
            np.testing.assert_array_equal(got.encoded[name][suffix], part)


def coded_world(root, codec: str) -> World:
    """A world whose store is written by the cache job, which calibrates its codecs."""
    from tiny_jobs import make_config

    from teacher_service.cache.job import cache
    from teacher_service.config import CacheConfig

    world = make_world(root)
    name, kwargs = world.teacher
    store = root / "coded"
    cache(
        make_config(
            CacheConfig,
            tars=world.tars, teacher=name, model_kwargs=kwargs, checkpoint=world.checkpoint, store=store, views=2,
            tap_codec=codec, workers=0, policy="a2", device="cpu",
        )
    )  # fmt: skip
    return replace(world, store=store)


def test_codes_are_what_travels_when_the_codec_is_small(tmp_path):
    world = coded_world(tmp_path, "int8")
    transport = AppTransport(service_app(world.store))
    source = connect(transport.url, transport=transport).source(["stage4"])
    tap = source.manifest.taps["stage4"]
    assert source.row_bytes() < 1.2 * tap.tokens * tap.channels + 2 * 4


def test_requests_are_cut_when_rows_exceed_what_the_service_gives(world):
    transport = AppTransport(service_app(world.store))
    client = connect(transport.url, transport=transport, retry=NO_RETRY)
    source = replace(client, max_rows=2).source()
    before = len(transport.asked)
    np.testing.assert_array_equal(source.read(ROWS).logits, client.source().read(ROWS).logits)
    assert len(transport.asked) - before == 3 + 1
    source = replace(client, max_bytes=3 * source.row_bytes()).source()
    before = len(transport.asked)
    assert source.read(ROWS).rows.tolist() == [list(row) for row in ROWS]
    assert len(transport.asked) - before == 2


def test_rows_land_in_memory_given_when_read_into(client):
    source = client.source()
    memory = source.buffers(8)
    batch = source.read(ROWS, out=memory)
    assert all(np.shares_memory(tap, memory[name]) for name, tap in batch.taps.items())
    np.testing.assert_array_equal(batch.taps["stage4"], source.read(ROWS).taps["stage4"])
    seen = [part.taps["stage4"].copy() for part in source.iter_unit(0, 0, out=memory, batch_size=8)]
    whole = next(source.iter_unit(0, 0)).taps["stage4"]
    np.testing.assert_array_equal(np.concatenate(seen), whole)


def test_store_over_http_is_the_store_when_compared(client, world):
    local, remote = open_store(world.store), client.store
    assert remote.manifest == local.manifest
    for unit in (0, 1):
        assert remote.keys(unit) == local.keys(unit)
        assert remote.quarantined(unit) == local.quarantined(unit)
        assert remote.labels(unit).tolist() == local.labels(unit).tolist()
        for view in (0, 1):
            assert remote.view_params(unit, view) == local.view_params(unit, view)
            assert remote.pixel_crcs(unit, view).tolist() == local.pixel_crcs(unit, view).tolist()
    for name, tensor in local.later_blocks().state_dict().items():
        assert torch.equal(remote.later_blocks().state_dict()[name], tensor)
    np.testing.assert_array_equal(remote.source().read(ROWS).logits, local.source().read(ROWS).logits)


def test_notebook_gets_rows_by_key_when_it_asks(client, world):
    keys = ["b004", "a000", "b004"]
    found = client.rows(keys, view=1)
    expected = open_store(world.store).source().read([RowId(1, 4, 1), RowId(0, 0, 1), RowId(1, 4, 1)])
    assert found.keys() == {"stage4", "stage3_prefix", "logits", "rows"}
    np.testing.assert_array_equal(found["stage4"], expected.taps["stage4"])
    assert found["rows"].tolist() == [list(row) for row in expected.rows]
    tensors = found.torch()
    assert torch.equal(tensors["logits"], torch.from_numpy(expected.logits))
    assert client.rows("a000", taps=["stage4"])["stage4"].shape == (1, *expected.taps["stage4"].shape[1:])


def test_notebook_is_told_when_a_key_is_unknown(client):
    with pytest.raises(InputError, match="nobody"):
        client.rows(["a000", "nobody"])


@pytest.mark.parametrize("change", [{"policy": view_policy("a1", 64)}, {"codec": "f32"}])
def test_answers_are_refused_when_the_service_changed_its_store(world, tmp_path, change):
    transport = AppTransport(service_app(world.store))
    source = connect(transport.url, transport=transport, retry=NO_RETRY).source()
    transport.serve(service_app(make_world(tmp_path, **change).store))
    with pytest.raises(MismatchError, match="store identity differs: what was opened at http://localhost:8000 has"):
        source.read(ROWS)


def test_answers_are_refused_when_the_service_changed_its_teacher(world, teacher):
    transport = AppTransport(service_app(world.store, teacher))
    live = connect(transport.url, transport=transport, retry=NO_RETRY).live()
    other = load_teacher(world.teacher[0], pretrained=False, model_kwargs=world.teacher[1])
    transport.serve(service_app(world.store, other))
    with pytest.raises(MismatchError, match=r"teacher\.weights_sha256 differs: what was opened at"):
        live.read(ROWS[:1], pixels=np.zeros((1, 64, 64, 3), np.uint8))


def test_live_source_is_refused_when_the_same_weights_are_used_in_another_way(world, teacher):
    transport = AppTransport(service_app(world.store, teacher))
    live = connect(transport.url, transport=transport, retry=NO_RETRY).live()
    name, kwargs = world.teacher
    other = load_teacher(name, checkpoint=world.checkpoint, model_kwargs=kwargs, compute_dtype="bfloat16")
    transport.serve(service_app(world.store, other))
    with pytest.raises(MismatchError, match=r"teacher identity differs: what was opened at"):
        live.read(ROWS[:1], pixels=np.zeros((1, 64, 64, 3), np.uint8))


def test_views_are_sent_in_pieces_when_a_body_takes_fewer_than_a_batch(world, teacher, views):
    limits = Limits(max_body_bytes=3 * 64 * 64 * 3 + 5000)
    transport = AppTransport(service_app(world.store, teacher, limits=limits))
    client = connect(transport.url, transport=transport, retry=NO_RETRY)
    assert client.service.json("/v1/teacher")["max_batch"] == 3  # of 8 in a forward pass
    expected = teacher(torch.from_numpy(views(ROWS))).logits.numpy()
    np.testing.assert_allclose(client.live().read(ROWS, pixels=views(ROWS)).logits, expected, rtol=1e-3, atol=1e-4)


def test_damage_is_named_when_the_stores_bytes_are_damaged(tmp_path):
    world = make_world(tmp_path)
    shard = world.store / "taps/stage4/c/0/0/0/0"
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 1
    shard.write_bytes(raw)
    transport = AppTransport(service_app(world.store))
    source = connect(transport.url, transport=transport, retry=NO_RETRY).source()
    with pytest.raises(CorruptStoreError, match="damaged"):
        source.read([RowId(0, 0, 0)])


def test_connection_is_refused_when_something_else_answers():
    other = FastAPI()
    other.get("/v1/manifest")(lambda: {"other": 1})
    transport = AppTransport(other)
    with pytest.raises(InputError, match="does not answer as this service does"):
        connect(transport.url, transport=transport)
