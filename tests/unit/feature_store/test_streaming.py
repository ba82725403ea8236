"""Shard-shuffled streams: whole, in seeded order, within their memory."""

import numpy as np
import pytest
from tiny_store import SAMPLES, tiny_store, unit_data

from feature_store import RowId, open_store
from feature_store.errors import InputError
from feature_store.read.streaming import ShuffledStream

PLACES = [(unit, view) for view in (0, 1) for unit in range(3)]


@pytest.fixture(params=["group by group", "batch by batch"])
def source(request, tmp_path):
    source = tiny_store(tmp_path / "s", quarantined={2: "broken"}).source()
    if request.param == "batch by batch":
        source.objects.gap_bytes = 0
    return source


def all_rows():
    return [RowId(unit, i, view) for unit, view in PLACES for i in range(SAMPLES[unit]) if i != 2]


@pytest.mark.parametrize("group_units", [1, 2, 4, 9])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_stream_gives_every_row_once_with_its_features(source, group_units, batch_size):
    stream = ShuffledStream(source, PLACES, seed=1, group_units=group_units, batch_size=batch_size)
    units = {unit: unit_data(source.manifest, unit) for unit in range(3)}
    seen, sizes = [], []
    for batch in stream.batches(epoch=0):
        seen += batch.rows
        sizes.append(len(batch.rows))
        want = np.float16([units[r.unit].taps["stage4"][r.view, r.position] for r in batch.rows])
        assert np.array_equal(batch.taps["stage4"], want)
        want = np.float16([units[r.unit].logits[r.view, r.position] for r in batch.rows])
        assert np.array_equal(batch.logits, want)
    assert sorted(seen) == sorted(all_rows())
    assert seen == stream.rows(0)
    assert set(sizes[:-1]) <= {batch_size}


def test_stream_order_depends_on_seed_and_epoch_alone(source, tmp_path):
    def order(seed, epoch, source=source, batch_size=4):
        return ShuffledStream(source, PLACES, seed=seed, group_units=2, batch_size=batch_size).rows(epoch)

    again = open_store(tmp_path / "s").source()
    assert order(1, 0) == order(1, 0, again) == order(1, 0, batch_size=9)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2, -3) for epoch in (0, 1, 2)}) == 9


def test_stream_mixes_rows_within_a_group_only(source):
    rows = ShuffledStream(source, PLACES, seed=5, group_units=2).rows(0)
    places = [(row.unit, row.view) for row in rows]
    first = set(places[: places.index(places[-1])])
    groups, at = [], 0
    while at < len(places):
        group = {places[at]}
        while at < len(places) and (places[at] in group or len(group) < 2):
            group.add(places[at])
            at += 1
        groups.append(group)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert set.union(*groups) == set(PLACES)
    assert first
    mixed = ShuffledStream(source, PLACES, seed=5, group_units=6).rows(0)
    assert [(r.unit, r.view) for r in mixed] != sorted((r.unit, r.view) for r in mixed)


def test_parts_share_an_epoch_without_overlap(source):
    whole = ShuffledStream(source, PLACES, seed=1, group_units=2).rows(3)
    parts = [ShuffledStream(source, PLACES, seed=1, group_units=2, part=(i, 3)).rows(3) for i in range(3)]
    assert [row for part in parts for row in part] == whole


def test_stream_states_and_keeps_its_memory(source):
    row, rows = source.row_bytes(), 3 + (10 if source.objects.gap_bytes else 0)
    stream = ShuffledStream(source, PLACES, seed=1, group_units=2, batch_size=3, memory_bytes=2 * rows * row)
    assert stream.needed_bytes == 2 * rows * row
    memory = set()
    for batch in stream.batches(0):
        for array in (batch.taps["stage4"], batch.logits):
            while array.base is not None:
                array = array.base
            memory.add((id(array), array.nbytes))
    assert len(memory) == 4
    assert sum(nbytes for _, nbytes in memory) == stream.needed_bytes
    with pytest.raises(InputError, match="rows of groups of 2 units in batches of 3 take"):
        ShuffledStream(source, PLACES, seed=1, group_units=2, batch_size=3, memory_bytes=2 * rows * row - 1)


def test_stream_stops_cleanly_when_left_early(source):
    batches = ShuffledStream(source, PLACES, seed=1, group_units=1, batch_size=2).batches(0)
    next(batches)
    batches.close()
    assert list(batches) == []


def test_epochs_at_the_same_time_do_not_share_memory(source):
    stream = ShuffledStream(source, PLACES, seed=1, group_units=2, batch_size=4)
    alone = [[(b.rows, b.taps["stage4"].copy()) for b in stream.batches(epoch)] for epoch in (0, 1)]
    for together in zip(stream.batches(0), stream.batches(1), strict=True):
        for batch, (rows, taps) in zip(together, [epoch.pop(0) for epoch in alone], strict=True):
            assert batch.rows == rows
            assert np.array_equal(batch.taps["stage4"], taps)


@pytest.mark.parametrize("arguments", [{"group_units": 0}, {"batch_size": 0}, {"part": (2, 2)}])
def test_stream_refuses_arguments_that_make_no_sense(source, arguments):
    with pytest.raises(InputError, match="cannot stream groups of"):
        ShuffledStream(source, PLACES, seed=1, **arguments)
