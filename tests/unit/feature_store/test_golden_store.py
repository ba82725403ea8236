"""A store of format version 1, kept in the repository, opens and reads equal in every later version."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from feature_store import RowId, open_store
from feature_store.read.blocks import read_blocks
from feature_store.tools.verify import verify

pytestmark = pytest.mark.golden
GOLDEN = Path(__file__).parents[2] / "golden"
STORE = GOLDEN / "store_v1"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_store_v1", GOLDEN / "make_store_v1.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_golden_store_reads_as_it_was_written(script):
    assert script.contents(open_store(STORE)) == json.loads((GOLDEN / "store_v1.json").read_text())


def test_golden_store_reads_within_its_codecs_error_of_what_was_encoded(script):
    store = open_store(STORE)
    batch = store.source().read([RowId(1, 2, 2)])
    assert np.allclose(batch.taps["stage4"][0], script.values("stage4", 1, 2)[2], atol=0.02)
    assert np.array_equal(batch.taps["stage3"][0], script.values("stage3", 1, 2)[2])
    assert np.array_equal(batch.logits[0], script.values("logits", 1, 2)[2].astype(np.float16))
    assert {name: tensor.tolist() for name, tensor in read_blocks(store.objects).items()} == {
        name: tensor.tolist() for name, tensor in script.BLOCKS.items()
    }


def test_golden_store_is_sound_and_has_an_index_that_covers_some_records():
    report = verify(STORE)
    assert report.findings == []
    assert (report.units, report.records, report.missing_views) == (3, 4, {0: [2], 2: [2]})
    committed = open_store(STORE).committed
    assert [committed.is_indexed(record.unit, record.views) for record in committed.records] == [
        True,
        True,
        False,
        False,
    ]


def test_golden_store_can_be_written_on(tmp_path, script):
    path = shutil.copytree(STORE, tmp_path / "store")
    store = open_store(path)
    store.write_unit(0, 2, script.unit_data(store.manifest, 0, range(2, 3)))
    store.write_unit(2, 2, script.unit_data(store.manifest, 2, range(2, 3)))
    assert verify(path).findings == []
    assert verify(path).missing_views == {}
    assert open_store(path).rows(["é0/3", "é2/1"], 2).tolist() == [[0, 3, 2], [2, 1, 2]]
