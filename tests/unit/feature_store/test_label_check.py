"""The teacher's accuracy on stored labels tells whether class indexes are the teacher's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from tiny_store import BLOCKS, CLASSES, tiny_manifest, unit_data

from feature_store.inputs.base import NO_LABEL
from feature_store.store import Store
from feature_store.tools.label_check import teacher_accuracy


def _store(path: Path, labels: np.ndarray) -> Store:
    """A store of one unit, whose last sample is quarantined."""
    manifest = tiny_manifest(codec="f32")
    store = Store.create(path, manifest, BLOCKS)
    store.write_unit(0, 0, replace(unit_data(manifest, 0, quarantined={4: "no image"}), labels=labels))
    return store


def test_teachers_accuracy_counts_readable_rows_with_a_label(tmp_path: Path) -> None:
    (logits,) = unit_data(tiny_manifest(codec="f32"), 0).features["logits"].values()
    right = logits[0].argmax(axis=1)
    wrong = (right + 1) % CLASSES
    mixed = np.array([right[0], wrong[1], NO_LABEL, right[3], right[4]])

    assert teacher_accuracy(_store(tmp_path / "right", right)) == (4, 4)
    assert teacher_accuracy(_store(tmp_path / "wrong", wrong)) == (4, 0)
    found = teacher_accuracy(_store(tmp_path / "mixed", mixed))
    assert found == (3, 2)
    assert str(found) == "66.7% of 3 labelled rows of the first unit"
    assert teacher_accuracy(_store(tmp_path / "none", np.full(5, NO_LABEL))) is None


def test_teachers_accuracy_is_unknown_without_logits(tmp_path: Path) -> None:
    manifest = tiny_manifest(codec="f32")
    manifest = replace(manifest, teacher=replace(manifest.teacher, num_classes=0), logits_codec=None)
    store = Store.create(tmp_path / "store", manifest, BLOCKS)
    data = unit_data(tiny_manifest(codec="f32"), 0)
    store.write_unit(0, 0, replace(data, features={"stage4": data.features["stage4"]}))

    assert teacher_accuracy(store) is None
