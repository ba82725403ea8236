"""What every FeatureSource must do; each implementation subclasses FeatureSourceConformance."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from feature_store.errors import InputError
from feature_store.format.addressing import RowId
from feature_store.source import FeatureBatch, FeatureSource

ROWS = [RowId(1, 4, 0), RowId(0, 0, 0), RowId(0, 13, 0), RowId(1, 4, 0), RowId(0, 2, 1)]


class FeatureSourceConformance:
    """Contract of ``feature_store.source.FeatureSource``.

    A subclass gives the fixtures ``source`` (over two units of 14 and 12 samples with views 0 and 1, position 9 of unit
    0 quarantined) and ``views`` (``views(rows)`` -> uint8 pixels [B, H, W, 3]).
    """

    relative_error = 1e-6  # of the source's codec, against float32 features

    def read(self, source: FeatureSource, views, rows: Sequence[RowId], taps=None, **how) -> FeatureBatch:
        return source.read(rows, taps, pixels=views(rows) if source.needs_pixels else None, **how)

    def test_source_follows_the_protocol_when_made(self, source):
        assert isinstance(source, FeatureSource)

    def test_read_gives_rows_in_the_order_asked_when_shuffled_and_repeated(self, source, views):
        together = self.read(source, views, ROWS)
        assert together.rows.tolist() == [list(row) for row in ROWS]
        for index, row in enumerate(ROWS):
            alone = self.read(source, views, [row])
            for name, tap in together.taps.items():
                np.testing.assert_allclose(tap[index], alone.taps[name][0], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(together.logits[index], alone.logits[0], rtol=1e-3, atol=1e-4)

    def test_read_gives_finite_float_arrays_of_the_taps_shape_when_asked_for_all(self, source, views, teacher):
        batch = self.read(source, views, ROWS)
        assert {"stage4", "stage3_prefix"} <= batch.taps.keys()
        for name, tap in batch.taps.items():
            assert tap.shape == (len(ROWS), *teacher.tap_shapes[name])
            assert np.issubdtype(tap.dtype, np.floating)
            assert np.isfinite(tap).all()
        assert batch.logits.shape == (len(ROWS), teacher.info.num_classes)

    def test_read_gives_the_teachers_features_when_compared_with_its_forward_pass(self, source, views, teacher):
        expected = teacher(torch.from_numpy(views(ROWS)))
        batch = self.read(source, views, ROWS)
        for got, want in ((batch.taps["stage4"], expected.taps["stage4"]), (batch.logits, expected.logits)):
            limit = self.relative_error * np.abs(want.numpy()) + 1e-4
            assert (np.abs(got.astype(np.float32) - want.numpy()) <= limit).all()

    def test_read_gives_only_the_taps_asked_for_when_named(self, source, views):
        assert self.read(source, views, ROWS, ["stage4"]).taps.keys() == {"stage4"}
        bare = self.read(source, views, ROWS, [])
        assert bare.taps == {}
        assert len(bare.logits) == len(ROWS)

    def test_read_is_refused_when_a_tap_is_unknown(self, source, views):
        with pytest.raises(InputError, match=r"has no tap 'stage9'; it has: .*stage4"):
            self.read(source, views, ROWS, ["stage9"])

    def test_read_keeps_what_is_encoded_when_asked_not_to_decode(self, source, views):
        batch = self.read(source, views, ROWS, ["stage4"], decode=False)
        assert batch.taps.keys() | batch.encoded.keys() == {"stage4"}
        assert batch.taps.keys() & batch.encoded.keys() == set()
        assert all(len(part) == len(ROWS) for parts in batch.encoded.values() for part in parts.values())

    @pytest.mark.parametrize("batch_size", [4, 256])
    def test_iter_unit_gives_every_readable_row_when_in_batches(self, source, views, batch_size):
        batches = list(source.iter_unit(0, 1, ["stage4"], batch_size=batch_size))
        rows = [RowId(*row) for batch in batches for row in batch.rows.tolist()]
        assert rows == [RowId(0, position, 1) for position in range(14) if position != 9]
        assert all(len(batch.rows) == batch_size for batch in batches[:-1])
        joined = np.concatenate([batch.taps["stage4"] for batch in batches])
        expected = self.read(source, views, rows, ["stage4"]).taps["stage4"]
        np.testing.assert_allclose(joined, expected, rtol=1e-3, atol=1e-4)
