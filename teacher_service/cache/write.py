"""Writing of an encoded unit."""

from rich.filesize import decimal

from feature_store.backends.base import ObjectStore
from feature_store.errors import DISK_FULL, ResourceError
from feature_store.store import Store
from feature_store.write.unit import EncodedUnit
from teacher_service.cache.decode import Task
from teacher_service.plan.disk import free_bytes
from teacher_service.plan.sizes import remaining_bytes
from teacher_service.stopping import RESUME


def disk_error(error: OSError, objects: ObjectStore, what: str, needed: int = 0) -> ResourceError:
    """A failed write as a ResourceError that says how much room is missing.

    Args:
        error: The system's error.
        objects: The store's objects.
        what: Name of the object that could not be written.
        needed: Bytes still to be written, if known.
    """
    if error.errno not in DISK_FULL:
        return ResourceError(f"{what} cannot be written to {objects.url}: {error}; {RESUME}")
    free = free_bytes(objects) or 0
    missing = f"{decimal(needed - free)} are missing" if needed > free else "a quota or file size limit is in the way"
    return ResourceError(
        f"{what} does not fit on the disk ({error.strerror}): {objects.url} needs {decimal(needed)} more, "
        f"{decimal(free)} are free, {missing}; {RESUME}"
    )


def write_unit(store: Store, task: Task, unit: EncodedUnit) -> None:
    """Write and commit a unit's views.

    Raises:
        ResourceError: The disk is full or cannot be written, or another process is writing this unit.
        CommittedError: Another process committed them first.
    """
    try:
        store.write_unit(task.unit, task.views.start, unit)
    except OSError as error:
        needed = remaining_bytes(store.layout, store.committed.missing_views())
        raise disk_error(error, store.objects, f"unit {task.unit}", needed) from error
