"""A store on disk: create it, open it, look rows up, add units."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import ArrayLike
from zarr.codecs import BytesCodec, Crc32cCodec

from feature_store.commits import CommitRecord, read_commits
from feature_store.errors import CorruptStoreError, InputError, ResourceError
from feature_store.layout import ArraySpec, array_specs
from feature_store.manifest import Manifest
from feature_store.objects import PARTIAL_SUFFIX, list_objects, sync_directories
from feature_store.reader import CommittedRows, ObjectReader, ZarrSource
from feature_store.sample import RowId, decode_keys, key_hash
from feature_store.views import ViewParams
from feature_store.writer import UnitData, write_unit

if TYPE_CHECKING:
    import torch

    from feature_store.teacher.split import LaterBlocks

BLOCKS = "teacher/blocks"
LOCK = ".writer.lock"


def open_store(url: str | Path) -> "Store":
    """Open an existing store.

    Raises:
        InputError: Not a store, of another format version, or on a file system this build cannot reach.
        CorruptStoreError: The manifest or a commit record is damaged.
    """
    if "://" in str(url) and not str(url).startswith("file://"):
        raise InputError(f"cannot open {url}: this build opens local stores only; copy the store or mount it")
    path = Path(str(url).removeprefix("file://"))
    metadata = path / "zarr.json"
    if not metadata.is_file():
        raise InputError(f"{path} is not a store (no zarr.json); write one with `teacher-service cache --store {path}`")
    try:
        attributes = json.loads(metadata.read_bytes())["attributes"]
        claimed, fingerprint = attributes["manifest"], attributes["manifest_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{metadata} holds no manifest ({error}): not a store of this format") from error
    manifest = Manifest.from_dict(claimed)
    if manifest.fingerprint() != fingerprint:
        raise CorruptStoreError(f"the manifest in {metadata} is damaged: its sha256 does not match; restore the file")
    return Store(path, manifest, read_commits(path, fingerprint))


class Store:
    """An open store. Make one with open_store or Store.create.

    Attributes:
        path: Its directory.
        manifest: What it claims.
        committed: Which rows may be read.
    """

    def __init__(self, path: Path, manifest: Manifest, records: Sequence[CommitRecord]) -> None:
        self.path, self.manifest = path, manifest
        self._specs = array_specs(manifest)
        self._reader = ObjectReader(path, manifest.capacity)
        self.committed = CommittedRows(manifest, records)

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest, blocks: Mapping[str, ArrayLike]) -> "Store":
        """Make an empty store: metadata, manifest and the later blocks, complete or not at all.

        Args:
            path: Directory to make.
            manifest: What it will claim.
            blocks: The later blocks' tensors, see ``feature_store.teacher.bundle``.

        Raises:
            InputError: The path exists.
        """
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} already exists; open it, choose another path or remove it")
        partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _write_skeleton(partial, manifest, blocks)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync_directories(path.parent, [path.name])
        return cls(path, manifest, ())

    def source(self, taps: Sequence[str] | None = None) -> ZarrSource:
        """Features by row; taps None for all."""
        return ZarrSource(self.path, self.manifest, self.committed, taps)

    def later_blocks(self, device: "str | torch.device" = "cpu") -> "LaterBlocks":
        """The teacher's later blocks, built from the store alone.

        Raises:
            MismatchError: The stored blocks are not those the manifest names.
            CorruptStoreError: They are damaged or incomplete.
        """
        from feature_store.teacher.bundle import build_later_blocks

        return build_later_blocks(self.manifest, self._blocks(), device)

    def rows(self, keys: Sequence[str], view: int) -> list[RowId]:
        """Addresses of samples by key, in the order given.

        Raises:
            InputError: A key no committed unit holds.
        """
        hashes = self._index[0]
        wanted = np.array([key_hash(key) for key in keys], np.uint64)
        where = np.searchsorted(hashes, wanted)
        return [
            self._row(key, int(at), int(wanted[i]), view) for i, (key, at) in enumerate(zip(keys, where, strict=True))
        ]

    def _row(self, key: str, at: int, hashed: int, view: int) -> RowId:
        hashes, units, positions = self._index
        while at < len(hashes) and hashes[at] == hashed:  # equal hashes of different keys are possible
            unit, position = int(units[at]), int(positions[at])
            if self.keys(unit)[position] == key:
                return RowId(unit, position, view)
            at += 1
        raise InputError(f"no committed unit holds sample key {key!r}; check the key, or finish the store")

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Key hashes of all committed samples, ascending, with their units and positions."""
        units = self.committed.units
        hashes = [self._unit_values("key_hash", unit) for unit in units]
        if not hashes:
            return (np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
        joined = np.concatenate(hashes)
        order = np.argsort(joined, kind="stable")
        unit_of = np.repeat(units, [len(part) for part in hashes])
        position_of = np.concatenate([np.arange(len(part)) for part in hashes])
        return joined[order], unit_of[order], position_of[order]

    def committed_views(self, unit: int) -> set[int]:
        """Committed views of a unit."""
        return self.committed.views(unit)

    def is_committed(self, unit: int, view: int) -> bool:
        """Whether a unit's view may be read."""
        return view in self.committed_views(unit)

    def keys(self, unit: int) -> list[str]:
        """Sample keys of a committed unit in tar order, quarantined ones included."""
        if unit not in self._keys:
            self._keys[unit] = decode_keys(self._unit_values("key", unit))
        return self._keys[unit]

    @cached_property
    def _keys(self) -> dict[int, list[str]]:
        return {}

    def labels(self, unit: int) -> np.ndarray:
        """Labels of a committed unit: int64 [n]; -1 where quarantined without one."""
        return self._unit_values("label", unit)

    def quarantined(self, unit: int) -> dict[int, str]:
        """Reason per quarantined position of a committed unit."""
        return dict(self._first_record(unit).quarantined)

    def view_params(self, unit: int, view: int) -> list[ViewParams | None]:
        """Stored parameters of a unit's views, for replay; None where quarantined."""
        values = {name: self._view_values(f"view/{name}", unit, view) for name in self._param_names}
        quarantined = self.committed.record(unit, view).quarantined
        samples = self.manifest.tars[unit].samples
        return [None if i in quarantined else self._params(values, i) for i in range(samples)]

    def _params(self, values: dict[str, np.ndarray], i: int) -> ViewParams:
        return ViewParams(
            crop=tuple(values["crop"][i].tolist()),
            flip=bool(values["flip"][i]),
            ops=tuple(values["ops"][i].tolist()) if "ops" in values else (),
            magnitudes=tuple(values["magnitude"][i].tolist()) if "magnitude" in values else (),
            erase=tuple(values["erase"][i].tolist()),
            noise_seed=int(values["noise_seed"][i]),
            interpolation=self.manifest.policy.interpolation,
        )

    @property
    def _param_names(self) -> list[str]:
        paths = [path.removeprefix("view/") for path in self._specs if path.startswith("view/")]
        return [name for name in paths if name != "pixel_crc"]

    def pixel_crcs(self, unit: int, view: int) -> np.ndarray:
        """CRC-32 of the view's pixels per sample: uint32 [n]; 0 where quarantined."""
        return self._view_values("view/pixel_crc", unit, view)

    def write_unit(self, unit: int, first_view: int, data: UnitData) -> None:
        """Write and commit V views of a unit, see ``feature_store.writer``. Needs locked_for_writing."""
        self.committed.add(write_unit(self.path, self.manifest, unit, first_view, data))
        self.__dict__.pop("_index", None)

    @contextmanager
    def locked_for_writing(self) -> Iterator[None]:
        """Hold the store as its only writer; released by the kernel if the process dies.

        Raises:
            ResourceError: Another process is writing.
        """
        with (self.path / LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ResourceError(f"another process is writing {self.path}; wait for it or stop it") from error
            yield

    def remove_leftovers(self) -> list[str]:
        """Delete every object no commit record vouches for: an interrupted writer's. Needs locked_for_writing."""
        records = self.committed.records
        vouched = {record.path for record in records} | {path for record in records for path in record.objects}
        kept = ("zarr.json", LOCK)
        leftovers = [
            path
            for path in list_objects(self.path)
            if path not in vouched and path.rpartition("/")[2] not in kept and not path.startswith(f"{BLOCKS}/")
        ]
        for path in leftovers:
            (self.path / path).unlink()
        return leftovers

    def info(self) -> dict[str, Any]:
        """What the store holds, as JSON: see ``feature-store info``."""
        from feature_store.summary import summarise

        return summarise(self)

    def _first_record(self, unit: int) -> CommitRecord:
        return self.committed.record(unit, min(self.committed.views(unit), default=0))

    def _unit_values(self, name: str, unit: int) -> np.ndarray:
        record, spec = self._first_record(unit), self._specs[name]
        return self._reader.chunk(spec, record)[: record.samples]

    def _view_values(self, name: str, unit: int, view: int) -> np.ndarray:
        record = self.committed.record(unit, view)
        return self._reader.chunk(self._specs[name], record, view)[: record.samples]

    def _blocks(self) -> dict[str, np.ndarray]:
        group = zarr.open_group(self.path, mode="r")[BLOCKS]
        if not isinstance(group, zarr.Group):
            raise CorruptStoreError(f"{BLOCKS} in {self.path} is not a group; write the store again")
        try:
            return {name: np.asarray(array[...]) for name, array in group.arrays()}
        except ValueError as error:  # zarr's crc32c codec
            raise CorruptStoreError(f"the later blocks in {self.path / BLOCKS} are damaged: {error}") from error


def _write_skeleton(path: Path, manifest: Manifest, blocks: Mapping[str, ArrayLike]) -> None:
    attributes = {"manifest": manifest.to_dict(), "manifest_sha256": manifest.fingerprint()}
    root = zarr.create_group(path, attributes=attributes)
    for spec in array_specs(manifest).values():
        _create_array(root, spec, manifest)
    for name, tensor in blocks.items():
        values = np.asarray(tensor)
        root.create_array(
            f"{BLOCKS}/{name}",
            data=values,
            chunks=tuple(max(1, n) for n in values.shape),
            compressors=[Crc32cCodec()],
        )
    (path / "commits").mkdir()
    for file in path.rglob("*"):
        if file.is_file():
            _sync(file)
    sync_directories(path, list_objects(path))


def _create_array(root: zarr.Group, spec: ArraySpec, manifest: Manifest) -> None:
    unit_shape = spec.unit_shape(manifest)
    leading = ("view", "row") if spec.per_view else ("row",)
    root.create_array(
        spec.path,
        shape=spec.shape(manifest),
        dtype=spec.dtype,
        chunks=spec.inner_shape() if spec.sharded else unit_shape,
        shards=unit_shape if spec.sharded else None,
        serializer=BytesCodec(endian="little") if spec.dtype.itemsize > 1 else BytesCodec(),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=spec.fill,
        dimension_names=(*leading, *spec.dimensions),
    )


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
