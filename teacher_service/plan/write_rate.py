"""Write rate of a disk, measured past its first, faster part."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from feature_store.errors import ResourceError

FILE_BYTES = 64 << 20  # of each file, about a unit of one view
_STEADY_FILES = 4  # at least, whose rate counts: the last quarter of all
_LARGEST_SHARE = 0.5  # of the free disk


@dataclass(frozen=True)
class WriteRate:
    """Bytes written to a disk, and the seconds they took.

    Attributes:
        bytes: Bytes written in all.
        seconds: Seconds they took.
        first: Bytes per second of the first file.
        steady: Bytes per second of the last quarter.
    """

    bytes: int
    seconds: float
    first: float
    steady: float


def measure_write_rate(
    folder: Path,
    seconds: float,
    most_bytes: int,
    *,
    file_bytes: int = FILE_BYTES,
    clock: Callable[[], float] = time.perf_counter,
) -> WriteRate:
    """Write files until the time is over or as much is written as the job will; each is on disk before the next.

    The files stay until the end, because a disk gets its fast part back when they are deleted.

    Args:
        folder: Where to write; a folder in it is made and deleted.
        seconds: Duration of the measurement.
        most_bytes: Bytes the job writes: more need not be measured.
        file_bytes: Bytes of each file.
        clock: Seconds.

    Raises:
        ResourceError: The disk cannot be written to, or has no room for a file.
    """
    limit = min(max(most_bytes, file_bytes), int(_free(folder) * _LARGEST_SHARE))
    if limit < file_bytes:
        raise ResourceError(f"{folder} has no room to measure its write rate: {file_bytes:,} bytes are needed twice")
    content, times = os.urandom(file_bytes), list[float]()  # random: some file systems compress
    started = clock()
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".teacher-service-writing-") as scratch:
            while not times or (clock() - started < seconds and (len(times) + 1) * file_bytes <= limit):
                begun = clock()
                with (Path(scratch) / str(len(times))).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                times.append(clock() - begun)
    except OSError as error:
        raise ResourceError(f"the write rate of {folder} cannot be measured: {error}; check the disk") from error
    last = times[-max(_STEADY_FILES, len(times) // 4) :]
    return WriteRate(len(times) * file_bytes, sum(times), file_bytes / times[0], len(last) * file_bytes / sum(last))


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
