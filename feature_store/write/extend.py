"""Growth of a store by views or tars; safe to interrupt."""

import json
from collections.abc import Callable
from typing import Any

from feature_store.backends.base import ObjectStore
from feature_store.commits.locks import exclusive, lock_name
from feature_store.commits.root import ROOT, manifest_attributes, read_manifest
from feature_store.errors import CorruptStoreError, Remedy
from feature_store.format.layout import StoreLayout
from feature_store.format.manifest import Growth, Manifest


def grow(objects: ObjectStore, wanted: Manifest) -> Growth:
    """Give a store the views and tars of a manifest that it lacks.

    Shapes of the arrays come first, the manifest last: until then the new rows exist for plain zarr clients only,
    as fill values, and readers and writers of either manifest work. In a bucket, grow from one process at a time.

    Raises:
        MismatchError: The manifest is not this one's grown.
        ResourceError: Another process is growing the store.
        CorruptStoreError: Metadata is missing or damaged.
    """
    with exclusive(objects, lock_name(None), f"another process is growing {objects.url}; wait for it"):
        growth = wanted.growth_from(read_manifest(objects))
        if growth:
            _resize_arrays(objects, growth.manifest)
            _edit(objects, ROOT, lambda root: root["attributes"].update(manifest_attributes(growth.manifest)))
            objects.sync([ROOT])
    return growth


def _resize_arrays(objects: ObjectStore, manifest: Manifest) -> None:
    layout = StoreLayout(manifest)
    shapes = {f"{spec.path}/zarr.json": layout.shape(spec) for spec in layout.arrays.values()}
    for path, shape in shapes.items():
        _edit(objects, path, lambda metadata, shape=shape: metadata.update(shape=shape))
    objects.sync(list(shapes))


def _edit(objects: ObjectStore, path: str, change: Callable[[dict[str, Any]], None]) -> None:
    try:
        metadata = json.loads(objects.get(path).tobytes())
        change(metadata)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(
            f"{path} is missing or damaged ({error}); repair the store, which restores metadata",
            remedy=Remedy.REPAIR,
        ) from error
    objects.put(path, json.dumps(metadata, indent=2).encode())
