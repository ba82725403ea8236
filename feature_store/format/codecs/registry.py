"""Codecs by name."""

import re
from dataclasses import replace

from feature_store.errors import InputError
from feature_store.format.codecs.base import ZSTD_SUFFIX, Codec
from feature_store.format.codecs.floats import Bfloat16Codec, Float16Codec, Float32Codec
from feature_store.format.codecs.group_quantise import Int4Codec, Int6Codec
from feature_store.format.codecs.quantise import Int8ChannelCodec, Int8Codec
from feature_store.format.codecs.top_k import TopKCodec

DEFAULT_TAP_CODEC = "int8"
"""The smallest whose error of every loss term is at most 1e-3, see docs/decisions/0004-default-codec.md."""

DEFAULT_LOGITS_CODEC = "f16"

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Float32Codec(),
        Float16Codec(),
        Bfloat16Codec(),
        Int8ChannelCodec(),
        Int8Codec(),
        Int6Codec(),
        Int4Codec(),
    )
}
"""Tap codecs, the most exact first; each also exists with ``+zstd``. Logits also know ``top<k>``."""


def get_codec(name: str) -> Codec:
    """Codec by name: one of CODECS or ``top<k>``, optionally followed by ``+zstd``.

    Raises:
        InputError: Unknown name.
    """
    base = name.removesuffix(ZSTD_SUFFIX)
    top = re.fullmatch(r"top([1-9]\d{0,5})", base)
    codec = TopKCodec(k=int(top[1])) if top else CODECS.get(base)
    if codec is None:
        raise InputError(
            f"unknown codec {name!r}; expected one of {', '.join(CODECS)}, or top<k> for logits; "
            f"add {ZSTD_SUFFIX} to compress what it stores"
        )
    return replace(codec, zstd=name.endswith(ZSTD_SUFFIX))
