"""Writes small tars for the tests of the tar modules."""

import io
import tarfile
from pathlib import Path


def tar_bytes(members, format=tarfile.PAX_FORMAT):
    """An uncompressed tar of (name, content) pairs, or of (TarInfo, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def samples(count, size=700):
    """Members of well-formed samples with recognisable contents."""
    for i in range(count):
        yield f"n01/{i:04}.jpg", bytes([i % 251]) * (size + i)
        yield f"n01/{i:04}.cls", str(i * 7).encode()


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)
