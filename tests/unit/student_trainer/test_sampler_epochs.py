import numpy as np
import pytest

from feature_store.errors import InputError
from feature_store.format.addressing import RowId
from student_trainer.data.sampler import EpochSampler

UNITS = [np.array([0, 1, 2, 4, 5, 6]), np.arange(7), np.arange(5), np.arange(9)]


def batches(**changes):
    return EpochSampler(UNITS, **{"batch_size": 4, "seed": 3, "shuffle_units": 2, "num_views": 2, **changes})


def epoch(of: EpochSampler, number: int, first: int = 0) -> list[list[RowId]]:
    of.set_epoch(number, first)
    return list(of)


def test_epoch_holds_every_row_once_when_complete():
    rows = batches().epoch_rows(0)
    expected = [(unit, int(position)) for unit, positions in enumerate(UNITS) for position in positions]
    assert sorted(map(tuple, rows.tolist())) == expected


def test_epoch_is_the_same_when_asked_again_and_differs_by_epoch_and_seed():
    assert epoch(batches(), 1) == epoch(batches(), 1)
    orders = [batches().epoch_rows(0), batches().epoch_rows(1), batches(seed=4).epoch_rows(0)]
    assert not any(np.array_equal(orders[i], orders[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_epoch_continues_exactly_when_started_in_the_middle():
    assert epoch(batches(), 2, first=3) == epoch(batches(), 2)[3:]
    planned = batches()
    planned.set_epoch(2, 3)
    assert len(planned) == planned.per_epoch - 3 == 3


def test_epoch_drops_the_incomplete_batch_when_rows_do_not_divide():
    planned = epoch(batches(), 0)
    assert [len(batch) for batch in planned] == [4] * 6  # 27 rows


@pytest.mark.parametrize(("num_views", "views"), [(2, [0, 1, 0, 1]), (3, [0, 1, 2, 0]), (None, [0, 1, 2, 3])])
def test_epoch_uses_its_view_when_there_are_several(num_views, views):
    planned = batches(num_views=num_views)
    assert [{row.view for batch in epoch(planned, e) for row in batch} for e in range(4)] == [{v} for v in views]


def test_epoch_mixes_rows_only_within_a_group_when_units_are_grouped():
    units = batches().epoch_rows(0)[:, 0].tolist()
    first = len(UNITS[units[0]])
    boundary = next(n for n in range(1, len(units) + 1) if len(set(units[:n])) == 3) - 1
    groups = set(units[:boundary]), set(units[boundary:])
    assert len(groups[0]) == len(groups[1]) == 2
    assert groups[0].isdisjoint(groups[1])
    assert len(set(units[:first])) == 2  # not unit after unit


def test_addresses_are_whole_numbers_when_a_unit_is_empty():
    planned = EpochSampler([[], [0, 2]], batch_size=1, seed=0)
    assert sorted(row for batch in epoch(planned, 0) for row in batch) == [RowId(1, 0, 0), RowId(1, 2, 0)]
    assert planned.epoch_rows(0).dtype == np.int64


def test_batches_are_refused_when_rows_do_not_fill_one():
    with pytest.raises(InputError, match=r"27 samples do not fill one batch of 28; lower --batch-size"):
        batches(batch_size=28)


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_batches_are_the_same_when_shared_out(processes, accumulate):
    whole = epoch(batches(batch_size=4), 1)
    shares = [
        epoch(batches(batch_size=4, rank=rank, processes=processes, accumulate=accumulate), 1)
        for rank in range(processes)
    ]
    assert {len(share) for share in shares} == {len(whole) * accumulate}
    for i, batch in enumerate(whole):
        pieces = [piece for share in shares for piece in share[i * accumulate : (i + 1) * accumulate]]
        assert [row for piece in pieces for row in piece] == batch
        assert {len(piece) for piece in pieces} == {4 // (processes * accumulate)}


def test_epoch_starts_at_a_whole_batch_when_resumed_in_pieces():
    of = batches(batch_size=4, accumulate=2)
    assert epoch(of, 0, 3) == epoch(of, 0)[6:]
    of.set_epoch(0, 3)
    assert len(of) == len(list(of))


def test_micro_batches_are_those_of_the_epoch_when_one_batch_is_asked_for():
    of = batches(accumulate=2, processes=2, rank=1)
    assert [rows for batch in range(6) for rows in of.micro_batches(3, batch)] == epoch(of, 3)


def test_batch_is_refused_when_it_cannot_be_shared_out():
    with pytest.raises(InputError, match=r"a batch of 4 cannot be shared by 3 processes in 1 passes each"):
        batches(processes=3)
