"""Frames: named arrays in one safetensors body, without copies.

A frame is a safetensors file (8 bytes of header length, JSON header, raw little-endian arrays), so every language with
a safetensors reader can take one. What this adds is kept in ``__metadata__``: ``crc32c.<array>`` per array, in decimal,
and strings of the sender (a service names its store there). See docs/how-to/http.md.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from feature_store.errors import InputError, WireError
from feature_store.format.checksums import crc32c

MEDIA_TYPE = "application/vnd.safetensors"
CHUNK_BYTES = 2 << 20
"""Bytes passed to a socket at a time."""
MAX_HEADER_BYTES = 1 << 20
_CHECKSUM = "crc32c."
_CHECKED_BYTES = 512 << 10
_LENGTH_BYTES = 8
_MAX_ARRAYS = 1024
_MAX_AXES = 8
_MAX_BYTES = 2**48

_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2", "U32": "<u4",
    "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
"""numpy's dtype of each on the wire; bfloat16 as its bit patterns, as stores keep it."""
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items() if name != "BF16"}


class Frame(NamedTuple):
    """A frame to send: its header, then the arrays' own memory.

    Leave the arrays as they are until the last byte is out: a transport keeps references, not copies.
    """

    header: bytes
    buffers: list[memoryview]
    nbytes: int

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """All bytes in order, in pieces of at most ``size``."""
        for buffer in (memoryview(self.header), *self.buffers):
            for start in range(0, len(buffer), size):
                yield buffer[start : start + size]


class Parsed(NamedTuple):
    """Content of a frame's header: shape, dtype and position of each array, in the order of their bytes."""

    arrays: dict[str, tuple[np.dtype, tuple[int, ...]]]
    metadata: dict[str, str]


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> Frame:
    """A frame of C-contiguous little-endian arrays, each with its crc32c; nothing is copied.

    Raises:
        InputError: An array's dtype or layout cannot be sent.
    """
    buffers = {}
    for name in wire_order(arrays):
        array = arrays[name]
        if not array.flags.c_contiguous:
            raise InputError(f"array {name!r} is not C-contiguous and cannot be sent; see numpy.ascontiguousarray")
        buffers[name] = memoryview(array.reshape(-1).view(np.uint8))
    described = {name: (arrays[name].dtype, arrays[name].shape) for name in buffers}
    head = header(described, {name: crc32c(buffer) for name, buffer in buffers.items()}, metadata or {})
    return Frame(head, list(buffers.values()), len(head) + sum(map(len, buffers.values())))


def wire_order(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Names in the order of a frame's arrays: wide items first, so that each starts at a multiple of its item size."""
    return sorted(arrays, key=lambda name: -arrays[name].itemsize)


def header(
    arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]], checksums: Mapping[str, int], metadata: Mapping[str, str]
) -> bytes:
    """The bytes before those of the arrays.

    Args:
        arrays: dtype and shape of each, in their order.
        checksums: crc32c of each.
        metadata: The frame's strings.

    Raises:
        InputError: A dtype cannot be sent.
    """
    strings = {**metadata, **{_CHECKSUM + name: str(checksums[name]) for name in arrays}}
    described: dict[str, Any] = {"__metadata__": strings}
    end = 0
    for name, (dtype, shape) in arrays.items():
        if dtype not in _NAMES:
            raise InputError(f"array {name!r} is {dtype} and cannot be sent; expected one of {', '.join(_DTYPES)}")
        begin, end = end, end + _size(dtype, shape)
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_frame(
    readinto: Callable[[memoryview], int | None], length: int, out: Mapping[str, np.ndarray] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A frame from a stream, every array straight into its memory.

    Allocates at most ``length`` bytes, even if the header claims more; bound it before calling.

    Args:
        readinto: Fills some of the memory given, returns how many bytes; 0 or None at the stream's end.
        length: Bytes of the whole frame, a response's Content-Length.
        out: Memory by array, for as many as wanted: at least as many rows (axis 0) of the same shape and dtype,
            C-contiguous. The arrays returned refer to it.

    Returns:
        Arrays by name, and the frame's strings.

    Raises:
        WireError: The stream ends early, or is no frame, or an array's crc32c is missing or does not match.
        InputError: Memory in out does not fit its array.
    """
    header_bytes = _header_bytes(bytes(_filled(readinto, memoryview(bytearray(min(_LENGTH_BYTES, length))))), length)
    parsed = _parse(
        bytes(_filled(readinto, memoryview(bytearray(header_bytes)))), length - _LENGTH_BYTES - header_bytes
    )
    arrays = {name: _memory(name, *described, (out or {}).get(name)) for name, described in parsed.arrays.items()}
    for name, array in arrays.items():
        memory, checksum = memoryview(array.reshape(-1).view(np.uint8)), 0
        for start in range(0, len(memory), _CHECKED_BYTES):  # while it is in the core's cache
            checksum = crc32c(_filled(readinto, memory[start : start + _CHECKED_BYTES]), checksum)
        if _CHECKSUM + name not in parsed.metadata:
            raise _refused(f"array {name!r} comes without its crc32c")
        _require_checksum(name, checksum, parsed.metadata)
    return arrays, parsed.metadata


def decode(body: bytes | bytearray | memoryview) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A frame already in memory, from any writer of safetensors; the arrays refer to it.

    Raises:
        WireError: It is no frame, or an array's crc32c, where it has one, does not match.
    """
    raw = memoryview(body).cast("B")
    start = _LENGTH_BYTES + _header_bytes(bytes(raw[:_LENGTH_BYTES]), len(raw))
    parsed = _parse(bytes(raw[_LENGTH_BYTES:start]), len(raw) - start)
    arrays = {}
    for name, (dtype, shape) in parsed.arrays.items():
        end = start + _size(dtype, shape)
        _require_checksum(name, crc32c(raw[start:end]), parsed.metadata)
        arrays[name] = np.frombuffer(raw[start:end], dtype).reshape(shape)
        start = end
    return arrays, parsed.metadata


def _filled(readinto: Callable[[memoryview], int | None], memory: memoryview) -> memoryview:
    done = 0
    while done < len(memory):
        got = readinto(memory[done:])
        if not got:
            raise WireError(f"the body ended {len(memory) - done} bytes early; retry")
        done += got
    return memory


def _header_bytes(raw: bytes, length: int) -> int:
    size = int.from_bytes(raw, "little")
    if len(raw) < _LENGTH_BYTES or not 2 <= size <= min(MAX_HEADER_BYTES, length - _LENGTH_BYTES):
        raise _refused(f"its header claims {size:,} bytes of {length:,}")
    return size


def _parse(header: bytes, data_bytes: int) -> Parsed:
    """A header whose arrays lie one after the other and fill the rest of the frame exactly."""
    try:
        described = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _refused("its header is not JSON") from error
    if not isinstance(described, dict) or len(described) > _MAX_ARRAYS:
        raise _refused("its header is not an object of at most a thousand arrays")
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refused("its metadata is not made of strings")
    found = [(*_described(name, entry), name) for name, entry in described.items()]
    found.sort(key=lambda item: item[:2])  # by place; an empty array before the one that starts there
    end = 0
    for begin, stop, dtype, shape, name in found:
        if begin != end or stop - begin != _size(dtype, shape):
            raise _refused(f"array {name!r} is not where and as long as its header says")
        end = stop
    if end != data_bytes:
        raise _refused(f"its arrays take {end:,} bytes, {data_bytes:,} follow its header")
    return Parsed({name: (dtype, shape) for _, _, dtype, shape, name in found}, metadata)


def _described(name: str, entry: Any) -> tuple[int, int, np.dtype, tuple[int, ...]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _refused(f"array {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _refused(f"array {name!r} has dtype {dtype!r}, expected one of {', '.join(_DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_AXES or not _are_sizes(offsets) or len(offsets) != 2:
        raise _refused(f"array {name!r} has shape {shape!r} at {offsets!r}")
    if _size(np.dtype(_DTYPES[dtype]), tuple(axis or 1 for axis in shape)) > _MAX_BYTES:  # numpy's limit, also if empty
        raise _refused(f"array {name!r} has shape {shape!r}")
    return offsets[0], offsets[1], np.dtype(_DTYPES[dtype]), tuple(shape)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    size = dtype.itemsize
    for axis in shape:  # exact: numpy's product would wrap around
        size *= axis
    return size


def _memory(name: str, dtype: np.dtype, shape: tuple[int, ...], out: np.ndarray | None) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype)
    fits = out.dtype == dtype and out.ndim == len(shape) > 0 and out.shape[1:] == shape[1:] and len(out) >= shape[0]
    if not fits or not out.flags.c_contiguous or not out.flags.writeable:
        raise InputError(
            f"out[{name!r}] is {out.dtype} {list(out.shape)}, expected {dtype} {list(shape)} or more rows, "
            "C-contiguous and writeable"
        )
    return out[: shape[0]]


def _require_checksum(name: str, checksum: int, metadata: Mapping[str, str]) -> None:
    claimed = metadata.get(_CHECKSUM + name)
    if claimed is not None and claimed != str(checksum):
        raise WireError(f"the crc32c of array {name!r} does not match: it was damaged in transit; retry")


def _refused(why: str) -> WireError:
    return WireError(f"the body is no frame: {why}; check that the URL is this service's")
