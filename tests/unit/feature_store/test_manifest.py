import dataclasses
import json

import pytest
from tiny_store import tiny_manifest

from feature_store.errors import InputError, MismatchError
from feature_store.format.manifest import InputInfo, Manifest


def test_manifest_survives_its_json_form():
    manifest = tiny_manifest()
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    assert Manifest.from_dict(manifest.to_dict()).fingerprint() == manifest.fingerprint()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("teacher.model_kwargs.depth", lambda m: dataclasses.replace(m.teacher, model_kwargs={"depth": 9})),
        ("split.depth", lambda m: dataclasses.replace(m.split, depth=9)),
        ("seed", lambda m: 9),
        ("num_views", lambda m: 9),
        ("policy.size[0]", lambda m: dataclasses.replace(m.policy, size=(16, 8))),
        ("tars[1].header_sha256", lambda m: (m.tars[0], dataclasses.replace(m.tars[1], header_sha256="x"), m.tars[2])),
        ("tars", lambda m: m.tars[:2]),
    ],
)
def test_require_equal_names_the_field_both_values_and_the_remedy(field, change):
    manifest = tiny_manifest()
    name = field.split(".")[0].split("[")[0]
    other = dataclasses.replace(manifest, **{name: change(manifest)})
    with pytest.raises(MismatchError) as caught:
        manifest.require_equal(other, "start a new store")
    assert caught.value.field == field
    assert repr(caught.value.expected) in str(caught.value)
    assert repr(caught.value.got) in str(caught.value)
    assert "start a new store" in str(caught.value)


def test_require_equal_names_the_teacher_then_its_weights_before_all_that_follows_from_them():
    manifest = tiny_manifest()
    split = dataclasses.replace(manifest.split, depth=9)
    teacher = dataclasses.replace(manifest.teacher, weights_sha256="f" * 64)
    retrained = dataclasses.replace(manifest, blocks_sha256="a" * 64, split=split, teacher=teacher)
    with pytest.raises(
        MismatchError, match="^teacher.weights_sha256 differs: .*; the teacher's weights differ; give the "
    ):
        manifest.require_equal(retrained, "-")
    other = dataclasses.replace(retrained, teacher=dataclasses.replace(teacher, name="another"))
    with pytest.raises(MismatchError, match=r"^teacher.name differs: store has 'test_vit.*', got 'another'; -$"):
        manifest.require_equal(other, "-")


def test_require_equal_lets_other_software_versions_pass():
    manifest = tiny_manifest()
    manifest.require_equal(dataclasses.replace(manifest, software={"numpy": "99"}), "-")


def test_from_dict_refuses_when_a_field_is_missing():
    data = tiny_manifest().to_dict()
    del data["seed"]
    with pytest.raises(InputError, match="field 'seed' is missing"):
        Manifest.from_dict(data)


def test_view_encoding_is_part_of_the_json_only_when_views_are_materialised():
    """Stores from before views could be materialised keep their hashes."""
    plain = tiny_manifest()
    jpeg = dataclasses.replace(plain, view_encoding="jpeg95")
    assert "view_encoding" not in plain.to_dict()
    assert Manifest.from_dict(plain.to_dict()) == plain
    assert jpeg.to_dict() == {**plain.to_dict(), "view_encoding": "jpeg95"}
    assert Manifest.from_dict(jpeg.to_dict()) == jpeg
    assert jpeg.identity() != plain.identity()
    with pytest.raises(MismatchError, match="view_encoding differs: store has None, got 'jpeg95'"):
        jpeg.growth_from(plain)


def test_inputs_are_part_of_the_json_only_when_samples_were_found_otherwise_than_in_tars():
    """Stores of tars keep the hashes they had before there were other inputs."""
    plain = tiny_manifest()
    folder = dataclasses.replace(plain, inputs=InputInfo("folder", "optional", "", ("ant", "bee"), 1000, 7))
    assert "inputs" not in plain.to_dict()
    assert Manifest.from_dict(json.loads(json.dumps(folder.to_dict()))) == folder
    assert folder.identity() != plain.identity()
    with pytest.raises(MismatchError, match="inputs differs"):
        folder.growth_from(plain)
    more = dataclasses.replace(plain, inputs=InputInfo("folder", "optional", "", ("ant", "bee", "cat"), 1000, 7))
    with pytest.raises(MismatchError, match="inputs.classes differs"):
        more.growth_from(folder)


def test_from_dict_refuses_inputs_of_an_unknown_format():
    data = dataclasses.replace(tiny_manifest(), inputs=InputInfo("folder", "none")).to_dict()
    data["inputs"]["format"] = "zip"
    with pytest.raises(InputError, match="inputs"):
        Manifest.from_dict(data)


def test_from_dict_refuses_when_the_view_encoding_is_unknown():
    with pytest.raises(InputError, match="store has view_encoding 'webp', this build knows jpeg95"):
        Manifest.from_dict({**tiny_manifest().to_dict(), "view_encoding": "webp"})
