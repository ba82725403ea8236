"""RemoteLiveSource: features from a service's live teacher."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import TypeAdapter

from feature_store.client import frames
from feature_store.client.service import ServiceClient, at_once
from feature_store.errors import InputError, MismatchError, UnknownFieldError, WireError
from feature_store.format.addressing import RowId, Rows, row_array
from feature_store.format.manifest import SplitInfo, TeacherInfo
from feature_store.parsing import parse
from feature_store.source import FeatureBatch

LOGITS = "logits"
UnitViews: TypeAlias = Callable[[int, int, int], Iterable[tuple[Sequence[RowId], np.ndarray]]]
"""Rows and pixels [b, H, W, 3] of a unit's view, in batches of some size."""


class RemoteLiveSource:
    """FeatureSource whose teacher runs behind a service.

    An instance may be used, forked, pickled and used again, from several threads: DataLoader workers that each ask for
    their own batch keep the teacher busy.

    Args:
        service: The service.
        taps: Taps to request by default; None for all it gives.
        precision: Format of responses: ``f32`` as computed, or ``f16`` in half the bytes.
        views: Makes the pixels of whole units, for iter_unit.

    Attributes:
        info: The service's description of its teacher.
        split: Where it is cut.
        seconds: Time spent waiting for it so far, in this process.

    Raises:
        InputError: The service has no live teacher, or not this tap.
        ResourceError: It is out of reach.
    """

    needs_pixels = True

    def __init__(
        self,
        service: ServiceClient,
        taps: Sequence[str] | None = None,
        *,
        precision: Literal["f16", "f32"] = "f32",
        views: UnitViews | None = None,
    ) -> None:
        described = service.json("/v1/teacher")
        self.service, self.seconds = service, 0.0
        try:
            self.info = parse(TypeAdapter(TeacherInfo), described["teacher"], f"the teacher of {service.url}")
            self.split = parse(TypeAdapter(SplitInfo), described["split"], f"the split of {service.url}")
            self._shapes = {str(name): tuple(map(int, shape)) for name, shape in described["taps"].items()}
            self._max_rows, self._identity = _positive(described["max_batch"]), str(described["identity"])
        except UnknownFieldError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, InputError) as error:
            raise InputError(f"{service.url} does not describe a teacher ({error!r}); check the URL") from error
        self._precision, self._views = precision, views
        self.tap_names = self._known(taps)

    def read(
        self,
        rows: Rows,
        taps: Sequence[str] | None = None,
        *,
        pixels: np.ndarray | None = None,
        decode: bool = True,
    ) -> FeatureBatch:
        """See FeatureSource.read; nothing is encoded, and all answers are of one teacher.

        Raises:
            InputError: Pixels are missing or not one view per row, or a tap is unknown.
            MismatchError: The service now has another teacher.
            ResourceError: It was busy or out of reach for as long as the retry policy allows.
            WireError: Its answers stayed damaged.
        """
        names = self._known(taps) if taps is not None else self.tap_names
        if pixels is None:
            raise InputError("a live source needs the rows' pixels [B, H, W, 3]; pass pixels=")
        if len(pixels) != len(rows):
            raise InputError(f"got pixels of {len(pixels)} views for {len(rows)} rows; pass one view per row")
        start = time.perf_counter()
        arrays = self.compute(pixels, names)
        self.seconds += time.perf_counter() - start
        return FeatureBatch(row_array(rows), {name: arrays[name] for name in names}, arrays.get(LOGITS))

    def iter_unit(
        self, unit: int, view: int, taps: Sequence[str] | None = None, *, batch_size: int = 256
    ) -> Iterator[FeatureBatch]:
        """See FeatureSource.iter_unit.

        Raises:
            InputError: It was made without views.
        """
        if self._views is None:
            raise InputError("this source cannot make whole units' views; pass views=, or read rows with their pixels")
        for rows, pixels in self._views(unit, view, batch_size):
            yield self.read(rows, taps, pixels=pixels)

    def compute(self, pixels: np.ndarray, taps: Sequence[str]) -> dict[str, np.ndarray]:
        """Arrays [n, ...] of views uint8 [n, H, W, 3], sent in pieces of a forward pass each.

        Raises:
            UserError: See read.
        """
        pieces = [pixels[start : start + self._max_rows] for start in range(0, len(pixels), self._max_rows)]
        answers = at_once([partial(self._request, piece, taps) for piece in pieces], 2)
        if len(answers) == 1:
            return answers[0]
        if not answers:
            return {name: np.empty((0, *self._shapes[name]), np.float32) for name in taps}
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    def _request(self, pixels: np.ndarray, taps: Sequence[str]) -> dict[str, np.ndarray]:
        frame = frames.encode({"pixels": np.ascontiguousarray(pixels)})
        target = f"/v1/features:compute?taps={','.join(taps)}&dtype={self._precision}"
        arrays, strings = self.service.frame(
            "POST", target, [frame.header, *frame.buffers], media_type=frames.MEDIA_TYPE
        )
        self._require_same_teacher(strings)
        for name in taps:
            if name not in arrays or arrays[name].shape != (len(pixels), *self._shapes[name]):
                raise WireError(f"{self.service.url} answered without tap {name!r} of {len(pixels)} views")
        if LOGITS in arrays and arrays[LOGITS].shape[:1] != (len(pixels),):
            raise WireError(f"{self.service.url} answered without logits of {len(pixels)} views")
        return arrays

    def _require_same_teacher(self, strings: Mapping[str, str]) -> None:
        """Refuse an answer of another teacher, or of the same weights used in another way (dtype, mean, split)."""
        weights = "teacher.weights_sha256", self.info.weights_sha256, strings.get("teacher")
        for field, expected, got in (weights, ("teacher identity", self._identity, strings.get("identity"))):
            if got != expected:
                raise MismatchError(
                    field,
                    where=f"what was opened at {self.service.url}",
                    expected=expected,
                    got=got,
                    remedy="the service now has another teacher: restart the runs that train on it",
                )

    def _known(self, taps: Sequence[str] | None) -> tuple[str, ...]:
        for name in taps or ():
            if name not in self._shapes:
                raise InputError(f"the service has no tap {name!r}; it has: {', '.join(self._shapes)}")
        return tuple(self._shapes if taps is None else taps)


def _positive(number: Any) -> int:
    if int(number) < 1:
        raise ValueError(f"expected a positive number, got {number}")
    return int(number)
