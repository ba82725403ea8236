"""LiveSource: teacher features computed in the training process, from each batch's pixels."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch

from feature_store.errors import InputError, MismatchError
from feature_store.format.addressing import RowId, Rows, row_array
from feature_store.format.manifest import Manifest, SplitInfo, TeacherInfo
from feature_store.source import FeatureBatch
from feature_store.teacher.model import Teacher
from student_trainer.data.batch import ViewDataset


class LiveSource:
    """FeatureSource that computes each batch's features from its pixels, float32 values on the CPU.

    Features pass through CPU memory, and pixels go to the GPU once more for the student; a cache job's fused attention
    is not used. A step is slower by that than one written for a live teacher alone.

    Attributes:
        teacher: The frozen teacher.
        seconds: Time spent in it so far, copies to and from its device included.
    """

    needs_pixels = True

    def __init__(self, teacher: Teacher, views: ViewDataset, units: Sequence[np.ndarray]) -> None:
        """Join a teacher and the views it may be asked about.

        Args:
            teacher: The frozen teacher, on its device.
            views: Makes the pixels of whole units for iter_unit.
            units: Readable positions per unit.
        """
        self.teacher, self.seconds = teacher, 0.0
        self._views, self._units = views, units

    def read(
        self,
        rows: Rows,
        taps: Sequence[str] | None = None,
        *,
        pixels: np.ndarray | None = None,
        decode: bool = True,
    ) -> FeatureBatch:
        """See FeatureSource.read; features are float32, whatever the teacher computes in, and never encoded.

        Raises:
            InputError: Pixels are missing or not one view per row, or a tap is unknown.
        """
        names = self._known(taps)
        if pixels is None:
            raise InputError("a live source needs the rows' pixels [B, H, W, 3]; pass pixels=")
        if len(pixels) != len(rows):
            raise InputError(f"got pixels of {len(pixels)} views for {len(rows)} rows; pass one view per row")
        start = time.perf_counter()
        output = self.teacher(torch.as_tensor(pixels))
        features = {name: output.taps[name].cpu().numpy() for name in names}
        logits = None if output.logits is None else output.logits.cpu().numpy()
        self.seconds += time.perf_counter() - start
        return FeatureBatch(row_array(rows), features, logits)

    def iter_unit(
        self, unit: int, view: int, taps: Sequence[str] | None = None, *, batch_size: int = 256
    ) -> Iterator[FeatureBatch]:
        """See FeatureSource.iter_unit; unreadable samples are left out."""
        positions = self._units[unit]
        for start in range(0, len(positions), batch_size):
            rows = [RowId(unit, int(position), view) for position in positions[start : start + batch_size]]
            batch = self._views[rows]
            yield self.read(batch.row_ids(), taps, pixels=batch.pixels.numpy())

    def _known(self, taps: Sequence[str] | None) -> Sequence[str]:
        known = self.teacher.tap_shapes
        if taps is None:
            return tuple(known)
        unknown = [name for name in taps if name not in known]
        if unknown:
            raise InputError(f"the teacher has no tap {unknown[0]!r}; it has: {', '.join(known)}")
        return taps


def require_same_teacher(manifest: Manifest, info: TeacherInfo, split: SplitInfo) -> None:
    """Refuse a live teacher that is not the one a store was written with, cut at the same place.

    Raises:
        MismatchError: Names the first field that differs, both values and the remedy.
    """
    expected = asdict(manifest.teacher) | {"split": manifest.split}
    got = asdict(info) | {"split": split}
    for field in ("name", "weights_sha256", "input_size", "mean", "std", "num_classes", "split"):
        if expected[field] != got[field]:
            raise MismatchError(
                field if field == "split" else f"teacher.{field}",
                expected=expected[field],
                got=got[field],
                remedy="use the --teacher options the store was written with, or write a store with this teacher",
            )
