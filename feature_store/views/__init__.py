"""Views: the exact pixels of augmented samples."""

from feature_store.views.apply import apply_view, check_pixels, pixel_crc
from feature_store.views.decode import decode_image, decoding_work
from feature_store.views.draws import ViewParams, draw_view
from feature_store.views.files import decode_view, encode_view, replay_view, view_tar
from feature_store.views.policies import POLICIES, PolicyName, ViewPolicy, view_policy

__all__ = [
    "POLICIES",
    "PolicyName",
    "ViewParams",
    "ViewPolicy",
    "apply_view",
    "check_pixels",
    "decode_image",
    "decode_view",
    "decoding_work",
    "draw_view",
    "encode_view",
    "pixel_crc",
    "replay_view",
    "view_policy",
    "view_tar",
]
