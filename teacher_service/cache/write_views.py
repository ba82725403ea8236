"""Writing of materialised views: a webdataset tar per view of a unit."""

import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from tarfile import TarError

from webdataset.writer import TarWriter

from feature_store.backends.base import PARTIAL_SUFFIX
from feature_store.backends.local import LocalObjects
from feature_store.backends.open import open_objects
from feature_store.commits.locks import lock_name, locked
from feature_store.errors import InputError, ResourceError
from feature_store.inputs.base import NO_LABEL
from feature_store.store import Store
from feature_store.views import view_tar
from teacher_service.cache.decode import Task
from teacher_service.share.store_lock import lock_folder
from teacher_service.stopping import RESUME

_SHOWN = 3  # names listed in an error message
_JPEG = ".jpg"
_PARTIAL = re.compile(rf"v\d+/u(\d+)\.tar\.[^/]+{re.escape(PARTIAL_SUFFIX)}")


class ViewTarWriter:
    """The folder or bucket a store's materialised views go to.

    Args:
        url: A path, ``file://``, ``s3://`` or ``gs://``.
        store: The store.

    Raises:
        InputError: A place that cannot be written to.
    """

    def __init__(self, url: str, store: Store) -> None:
        self._store = store
        self._objects = open_objects(url)
        if not self._objects.lists:
            raise InputError(f"--views-out {url} is read only; give a folder, s3:// or gs://")

    def write(self, task: Task, views: Sequence[Mapping[str, tuple[bytes, int]]]) -> None:
        """Write the tars of a task's views; the same views always give the same bytes.

        Args:
            task: Unit and views.
            views: JPEG and label by sample key, in the tar's order; of each view.

        Raises:
            InputError: A tar of other views is there.
            ResourceError: The place is full or cannot be written.
        """
        paths = [view_tar(task.unit, view) for view in task.views]
        try:
            with self._writing(task.unit):
                for path, samples in zip(paths, views, strict=True):
                    self._require_same(path, samples)
                    self._objects.put(path, tar_of(samples))
                self._objects.sync(paths)
        except OSError as error:
            raise ResourceError(
                f"the views of unit {task.unit} cannot be written to {self._objects.url}: {error}; {RESUME}"
            ) from error

    def _require_same(self, path: str, samples: Mapping[str, tuple[bytes, int]]) -> None:
        """Refuse to put a tar in the place of another store's; an interrupted job's own has the same views."""
        try:
            there = _jpegs(self._objects.get(path).tobytes())
        except (FileNotFoundError, TarError):
            return
        both = there.keys() & samples.keys()
        if (there and not both) or any(there[key] != samples[key][0] for key in both):
            raise InputError(
                f"{path} in --views-out {self._objects.url} holds other views than this job's: another store's, or "
                "made by another version of Pillow; give another place, or delete it if it is not needed"
            )

    def remove_orphans(self) -> None:
        """Delete tars that killed processes began. One that is being written now has a lock; buckets keep no halves."""
        if not isinstance(self._objects, LocalObjects) or not isinstance(self._store.objects, LocalObjects):
            return  # of a store in a bucket, other machines' writers hold no lock that is seen here
        for path in self._objects.list("v"):
            if found := _PARTIAL.fullmatch(path):
                with suppress(ResourceError, FileNotFoundError), self._writing(int(found[1]), "it is being written"):
                    self._objects.delete(path)

    def _writing(self, unit: int, refusal: str | None = None) -> AbstractContextManager[None]:
        return locked(lock_folder(self._store.objects) / f"views-{lock_name(unit)}", refusal)

    def require_committed(self) -> None:
        """Refuse a place without the views the store has committed already.

        Raises:
            InputError: Names the first tars that are missing.
        """
        store = self._store
        committed = {
            view_tar(unit, view) for unit in range(len(store.manifest.tars)) for view in store.committed_views(unit)
        }
        missing = sorted(committed - set(self._objects.list("v")))
        if missing:
            raise InputError(
                f"--views-out {self._objects.url} lacks {len(missing)} of the {len(committed)} view tars of what "
                f"{store.path} has committed ({', '.join(missing[:_SHOWN])}...); give the place of the first run"
            )


def _jpegs(tar: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        files = {member.name: members.extractfile(member) for member in members if member.name.endswith(_JPEG)}
        return {name.removesuffix(_JPEG): file.read() for name, file in files.items() if file is not None}


def tar_of(samples: Mapping[str, tuple[bytes, int]]) -> memoryview:
    """A webdataset tar of JPEGs and labels by sample key."""
    file = io.BytesIO()
    with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer:  # for keys long or not ASCII
        for key, (jpeg, label) in samples.items():
            labelled = {} if label == NO_LABEL else {"cls": str(label).encode()}
            writer.write({"__key__": key, "jpg": jpeg, **labelled})
    return file.getbuffer()
