"""Labels of tars are looked at before a run's first step."""

import numpy as np
import pytest
from training_world import samples, write_tar

from feature_store.errors import InputError
from feature_store.inputs.tar import Tar
from student_trainer.data.labels import require_label, require_labels


@pytest.fixture
def tars(tmp_path) -> list[Tar]:
    """Two tars with labels 0 to 3; one sample of the first has none."""
    first = samples(6, seed=1, prefix="a")
    del first[1]["cls"]
    return [
        Tar.open(write_tar(tmp_path / "a.tar", first)),
        Tar.open(write_tar(tmp_path / "b.tar", samples(4, seed=2, prefix="b"))),
    ]


def test_labels_are_accepted_when_all_are_below_the_classes(tars):
    require_labels(tars, 4, "--tars")


def test_labels_are_refused_naming_the_first_when_one_is_out_of_range(tars):
    with pytest.raises(InputError) as caught:
        require_labels(tars, 3, "--tars")
    assert str(caught.value) == (
        f"--tars: label of sample 'a003' in {tars[0].url} is 3, expected 0..2 (are labels counted from one?); raise "
        "--num-classes or fix the tar"
    )


def test_only_chosen_samples_are_looked_at_when_positions_are_given(tars):
    first, second = np.array([0, 1, 2, 4]), np.array([0, 1])
    require_labels(tars, 3, "--tars", [first, second])
    with pytest.raises(InputError, match="sample 'b003'"):
        require_labels(tars, 3, "--tars", [first, np.array([1, 3])])
    with pytest.raises(ValueError, match="zip"):
        require_labels(tars, 3, "--tars", [first])


@pytest.mark.parametrize(("label", "accepted"), [(-2, False), (0, True), (4, True), (5, False), (6, False)])
def test_label_is_refused_when_outside_zero_to_below_the_classes(label, accepted):
    if accepted:
        require_label(label, 5, "", "k", "t.tar")
        return
    hint = " (are labels counted from one?)" if label == 5 else ""
    with pytest.raises(InputError) as caught:
        require_label(label, 5, "", "k", "t.tar")
    assert str(caught.value) == (
        f"label of sample 'k' in t.tar is {label}, expected 0..4{hint}; raise --num-classes or fix the tar"
    )


def test_sample_without_a_label_is_refused_unless_labels_are_optional():
    require_label(-1, 5, "", "k", "t.tar", optional=True)
    with pytest.raises(InputError, match=r"^--val-tars: sample 'k' in t.tar has no label, expected one of 0..4: "):
        require_label(-1, 5, "--val-tars: ", "k", "t.tar")
    with pytest.raises(InputError, match="is 5, expected"):
        require_label(5, 5, "", "k", "t.tar", optional=True)
