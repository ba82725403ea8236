"""Pins the names and signatures other code may call; change them together with the docs and the changelog."""

import inspect
from collections.abc import Callable

import pytest

import feature_store
from feature_store import teacher, views
from feature_store.source import FeatureSource
from feature_store.store import Store
from student_trainer import official
from student_trainer.methods import METHODS, cap, dfm, kd


def signature(callable_: Callable) -> str:
    """Names, kinds and defaults; annotations are free to become more precise."""
    found = inspect.signature(callable_)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize(
    ("callable_", "expected"),
    [
        (
            cap.CrossAttentionProjector,
            "(student_dim, teacher_dim, query_hw, key_hw, num_heads, softmax_scale=5.0, windows=(1, 1), "
            "learned_query=True, norm='batch', token_order='raster', patchify='full')",
        ),
        (cap.CrossAttentionProjector.forward, "(self, student_BCHW, query_BND=None)"),
        (dfm.original_view_loss, "(projected_BND, teacher_BND)"),
        (dfm.alternative_view_loss, "(projected_BND, teacher_BND)"),
        (kd.kd_loss, "(student_BK, probabilities_BK, temperature=1.0)"),
        (official.load_projector, "(projector, official_state, prefix=None)"),
        (official.load_swin, "(timm_model, official_state)"),
        (official.load_vit, "(timm_model, official_state)"),
        (feature_store.open_store, "(url)"),
        (Store.source, "(self, taps=None)"),
        (Store.rows, "(self, keys, view)"),
        (Store.later_blocks, "(self, device='cpu')"),
        (teacher.split_teacher, "(model, depth=None, *, drop_prefix=False)"),
        (views.draw_view, "(policy, seed, key, view, source_size)"),
        (views.apply_view, "(image, params, size, *, out=None)"),
    ],
)
def test_public_signature_is_unchanged_when_called_by_others(callable_, expected):
    assert signature(callable_) == expected


def test_methods_share_their_signatures_when_one_is_exchanged_for_another():
    assert {signature(method.forward) for method in METHODS.values()} == {"(self, student, batch)"}
    assert {signature(method).split("=")[0] for method in METHODS.values()} == {"(config, student, teacher, task"}


def test_names_of_the_store_are_these():
    assert sorted(feature_store.__all__) == ["FeatureBatch", "FeatureSource", "RowId", "Store", "connect", "open_store"]
    assert all(callable(getattr(feature_store, name)) for name in feature_store.__all__)


def test_sources_are_read_by_rows_and_taps_when_called_by_others():
    assert feature_store.FeatureSource is FeatureSource
    assert list(inspect.signature(FeatureSource.read).parameters)[:3] == ["self", "rows", "taps"]
