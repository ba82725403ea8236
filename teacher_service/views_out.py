"""Writes materialised views: one webdataset tar for each view of a unit, whole under its name or not there."""

import io
from collections.abc import Mapping, Sequence

from webdataset.writer import TarWriter

from feature_store.errors import InputError, ResourceError
from feature_store.objects.local import open_objects
from feature_store.store import Store
from feature_store.views import view_tar
from teacher_service.decoding import Task
from teacher_service.writing import RESUME

_SHOWN = 3  # names listed in an error message


class ViewsOut:
    """The folder or bucket a store's materialised views go to.

    Args:
        url: A path, ``file://``, ``s3://`` or ``gs://``.

    Raises:
        InputError: A place that cannot be written to.
    """

    def __init__(self, url: str) -> None:
        self._objects = open_objects(url)
        if not self._objects.lists:
            raise InputError(f"--views-out {url} is read only; give a folder, s3:// or gs://")

    def write(self, task: Task, views: Sequence[Mapping[str, tuple[bytes, int]]]) -> None:
        """Write the tars of a task's views; the same views always give the same bytes.

        Args:
            task: Unit and views.
            views: JPEG and label by sample key, in the tar's order; of each view.

        Raises:
            ResourceError: The place is full or cannot be written.
        """
        paths = [view_tar(task.unit, view) for view in task.views]
        try:
            for path, samples in zip(paths, views, strict=True):
                self._objects.put(path, tar_of(samples))
            self._objects.sync(paths)
        except OSError as error:
            raise ResourceError(
                f"the views of unit {task.unit} cannot be written to {self._objects.url}: {error}; {RESUME}"
            ) from error

    def require_views_of(self, store: Store) -> None:
        """Refuse a place without the views a store has committed already.

        Raises:
            InputError: Names the first tars that are missing.
        """
        committed = {
            view_tar(unit, view) for unit in range(len(store.manifest.tars)) for view in store.committed_views(unit)
        }
        missing = sorted(committed - set(self._objects.list("v")))
        if missing:
            raise InputError(
                f"--views-out {self._objects.url} lacks {len(missing)} of the {len(committed)} view tars of what "
                f"{store.path} has committed ({', '.join(missing[:_SHOWN])}...); give the place the job was begun with"
            )


def tar_of(samples: Mapping[str, tuple[bytes, int]]) -> memoryview:
    """A webdataset tar of JPEGs and labels by sample key."""
    file = io.BytesIO()
    with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:  # for keys long or not ASCII
        for key, (jpeg, label) in samples.items():
            writer.write({"__key__": key, "jpg": jpeg, "cls": str(label).encode()})
    return file.getbuffer()
