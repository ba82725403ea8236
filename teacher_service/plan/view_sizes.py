"""Sizes of materialised view tars, predicted from a subset of samples."""

from collections.abc import Sequence
from dataclasses import dataclass

from feature_store.backends.base import ObjectStore
from feature_store.backends.local import LocalObjects
from feature_store.backends.open import open_objects
from feature_store.errors import InputError
from feature_store.format.manifest import Manifest
from feature_store.inputs.base import SampleSource
from teacher_service.cache.decode import Task, ViewDataset
from teacher_service.plan.disk import existing_folder, free_bytes

MEASURED = 64
_BLOCK = 512  # of a tar: each member has one before it and fills its last one
_RECORD = 20 * _BLOCK  # a tar's end is filled up to one


@dataclass(frozen=True)
class ViewTars:
    """Estimated sizes of materialised views.

    Attributes:
        url: Destination of the view tars.
        view_bytes: Mean bytes of a view with its label.
        total_bytes: Bytes of all view tars.
        remaining_bytes: Bytes still to be written.
        needed_bytes: The same, plus the store's remaining bytes if it is on the same disk.
        free_bytes: Free disk there; None for a bucket.
    """

    url: str
    view_bytes: float
    total_bytes: int
    remaining_bytes: int
    needed_bytes: int
    free_bytes: int | None

    @property
    def fits(self) -> bool:
        """Whether there is room for them."""
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


def view_tars(
    url: str,
    manifest: Manifest,
    tars: Sequence[SampleSource],
    remaining_images: int,
    store: ObjectStore,
    store_bytes: int,
) -> ViewTars:
    """Predict from the first view of some samples, spread over the tars.

    Args:
        url: Where the view tars go.
        manifest: The store's manifest.
        tars: Its tars.
        remaining_images: Views still to be written.
        store: Where the store is or will be.
        store_bytes: Bytes it still needs.
    """
    objects = open_objects(url)
    size, images = mean_view_bytes(manifest, tars), sum(map(len, tars)) * manifest.num_views
    total = round(size * images) + len(tars) * manifest.num_views * _RECORD // 2
    remaining = round(total * remaining_images / images)
    same_disk = _device(objects) is not None and _device(objects) == _device(store)
    return ViewTars(url, size, total, remaining, remaining + store_bytes * same_disk, free_bytes(objects))


def mean_view_bytes(manifest: Manifest, tars: Sequence[SampleSource]) -> float:
    """Bytes a view takes in a tar, label included, on average over MEASURED samples.

    Raises:
        InputError: None of them can be read.
    """
    dataset = ViewDataset(tars, manifest.policy, manifest.seed, manifest.view_encoding)
    places = [(unit, position) for unit, tar in enumerate(tars) for position in range(len(tar))]
    step = max(1, len(places) // MEASURED)
    samples = [dataset.sample(Task(unit, range(1)), position) for unit, position in places[::step][:MEASURED]]
    jpegs = [len(sample.jpegs[0]) for sample in samples if sample.reason is None]
    if not jpegs:
        raise InputError(f"none of {len(samples)} images tried can be read ({samples[0].reason}); fix the tars")
    whole_blocks = [-(-size // _BLOCK) * _BLOCK for size in jpegs]
    return sum(whole_blocks) / len(jpegs) + 3 * _BLOCK  # the JPEG's header, the label's, the label


def _device(objects: ObjectStore) -> int | None:
    return existing_folder(objects).stat().st_dev if isinstance(objects, LocalObjects) else None
