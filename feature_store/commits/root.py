"""The root group of a store, whose attributes are the manifest."""

from typing import Any

from feature_store.backends.base import ObjectStore
from feature_store.backends.credentials import SERVED
from feature_store.errors import CorruptStoreError, InputError, Remedy
from feature_store.format.codecs.bound import require_decodable
from feature_store.format.manifest import Manifest, fingerprint_of, require_version
from feature_store.parsing import load_json

ROOT = "zarr.json"


def read_manifest(objects: ObjectStore) -> Manifest:
    """The manifest of a store.

    Raises:
        InputError: Not a store of this format.
        CorruptStoreError: The manifest is damaged.
    """
    try:
        raw = objects.get(ROOT).tobytes()
    except FileNotFoundError:
        raise _not_a_store(objects.url) from None
    where = f"{objects.url}/{ROOT}"
    try:
        attributes = load_json(raw)["attributes"]
        claimed, fingerprint = attributes["manifest"], attributes["manifest_sha256"]
        require_version(claimed)
        damaged = fingerprint_of(claimed) != fingerprint  # of what is there, also what a newer release added
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where} holds no manifest ({error}): not a store of this format") from error
    if damaged:
        raise CorruptStoreError(f"the manifest in {where} is damaged: its sha256 does not match; restore the file")
    manifest = Manifest.from_dict(claimed)
    require_decodable(manifest)
    return manifest


def _not_a_store(url: str) -> InputError:
    if not url.startswith(("http://", "https://")):
        what = f"{url} is not a store (no {ROOT}); check the path, or write a store there"
        return InputError(what, remedy=Remedy.WRITE_STORE)
    served = "check the URL" if url.endswith(SERVED) else f"for a service open {url}{SERVED}"
    return InputError(f"{url} is not a store (no {ROOT}); {served}", remedy=Remedy.SOURCE)


def manifest_attributes(manifest: Manifest) -> dict[str, Any]:
    """The root group's attributes."""
    return {"manifest": manifest.to_dict(), "manifest_sha256": manifest.fingerprint()}
