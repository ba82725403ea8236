"""Tars of a store's units, found by their headers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_jobs import write_tars
from tiny_store import tiny_manifest

from feature_store.errors import InputError, MismatchError, Remedy
from feature_store.format.manifest import TarInfo
from feature_store.inputs.tar import Tar
from feature_store.inputs.unit_tars import UnitTars


@pytest.fixture
def tars(tmp_path):
    return [Tar.open(url) for url in write_tars(tmp_path, *range(2, 14))]


@pytest.fixture
def store(tars):
    infos = tuple(TarInfo(tar.name, len(tar), tar.header_sha256) for tar in tars)
    manifest = replace(tiny_manifest(), tars=infos, capacity=13)
    return SimpleNamespace(manifest=manifest, keys=lambda unit: tars[unit].keys)


def test_tars_are_found_in_any_order_when_they_have_other_names(tars, store, tmp_path):
    urls = [str(tmp_path / f"other-{at}.tar") for at in range(len(tars))]
    for tar, url in zip(tars, urls, strict=True):
        (tmp_path / tar.name).rename(url)
    units = UnitTars(urls[::-1])
    for unit in (7, 0, 11, 7, 3):
        assert units.find(store, unit).url == urls[unit]


def test_tar_is_named_when_it_is_missing(tars, store):
    units = UnitTars([tar.url for tar in tars[1:]])
    for _ in range(2):
        with pytest.raises(InputError, match=r"tar images-000.tar is not among those given") as caught:
            units.find(store, 0)
        assert caught.value.remedy is Remedy.ADD_TARS


def test_tar_of_the_name_is_refused_when_its_headers_are_others(tars, store, tmp_path):
    write_tars(tmp_path, 5)  # images-000.tar, which had two samples
    units = UnitTars([tar.url for tar in tars])
    for _ in range(2):
        with pytest.raises(
            MismatchError, match=r"tars\[images-000.tar\].samples differs: store has 2, got 5"
        ) as caught:
            units.find(store, 0)
        assert "restore it, give the tars or folder that the store was written from, or" in str(caught.value)
    assert units.find(store, 1).url == tars[1].url
