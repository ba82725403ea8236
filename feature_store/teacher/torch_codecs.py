"""Decoding on the trainer's device: codes travel there, values are made there.

The same steps in the same order as each codec's numpy ``decode``, in float32.

Shape legend: B rows, N tokens, C channels, G groups of channels, K classes.
"""

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from feature_store.format.codecs.bound import BoundCodec
from feature_store.format.codecs.floats import Bfloat16Codec, FloatCodec
from feature_store.format.codecs.group_quantise import GROUP, GroupCodec
from feature_store.format.codecs.quantise import Int8ChannelCodec, Int8Codec
from feature_store.format.codecs.top_k import TopKCodec

Parts = Mapping[str, Tensor]
Statistics = Mapping[str, Tensor]


class TorchDecoder:
    """Decodes one stored value on the device of its parts; statistics are copied there once.

    Args:
        codec: The value's codec, from ``feature_store.format.codecs.registry.bound_codecs(store.manifest)``.
    """

    def __init__(self, codec: BoundCodec) -> None:
        self.codec = codec
        self._decode = _decoder(codec)
        self._on_device = cache(self._statistics)

    def __call__(self, parts: Mapping[str, np.ndarray | Tensor], device: str | torch.device | None = None) -> Tensor:
        """Float32 values [B, *shape] of encoded rows.

        Args:
            parts: Arrays or tensors by suffix, as ``FeatureBatch.encoded`` holds them.
            device: Where to decode; None for where the parts are.
        """
        tensors = {name: as_tensor(part).to(device, non_blocking=True) for name, part in parts.items()}
        return self._decode(tensors, self._on_device(tensors[""].device))

    def _statistics(self, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.as_tensor(array, device=device) for name, array in (self.codec.statistics or {}).items()}

    def __reduce__(self):
        return TorchDecoder, (self.codec,)


def as_tensor(part: np.ndarray | Tensor) -> Tensor:
    """A part as a tensor without a copy; torch computes little with uint16 and uint32, which become int16 and int32."""
    if isinstance(part, Tensor):
        return part
    signed = {"uint16": np.int16, "uint32": np.int32}.get(part.dtype.name)
    return torch.from_numpy(part if signed is None else part.view(signed))


def _decoder(codec: BoundCodec) -> Callable[[Parts, Statistics], Tensor]:
    match codec.codec:
        case FloatCodec():
            return lambda parts, _: parts[""].float()
        case Bfloat16Codec():
            return lambda parts, _: parts[""].view(torch.bfloat16).float()
        case Int8Codec():
            return _int8
        case Int8ChannelCodec():
            return _int8_channel
        case GroupCodec() as grouped:
            return lambda parts, statistics: _grouped(parts, statistics, grouped)
        case TopKCodec():
            return lambda parts, _: _top_k(parts, codec.shape[0])
    raise TypeError(f"codec {codec.codec.name} has no torch form")


def _int8(parts: Parts, statistics: Statistics) -> Tensor:
    z_BNC = parts[""].float() * parts["scale"].float()[..., None]
    return z_BNC.mul_(statistics["std"]).add_(statistics["mean"])


def _int8_channel(parts: Parts, _: Statistics) -> Tensor:
    x_BNC = parts[""].float() * parts["scale"].float()[:, None]
    return x_BNC.add_(parts["offset"].float()[:, None])


def _grouped(parts: Parts, statistics: Statistics, codec: GroupCodec) -> Tensor:
    channels = len(statistics["mean"])
    steps_BNG = parts["group"].float() * parts["scale"].float()[..., None]
    x_BNC = _unpacked(parts[""], codec.bits, channels).float().add_(codec.least)
    x_BNC.mul_(steps_BNG.tile(GROUP)[..., :channels])
    return x_BNC.mul_(statistics["std"]).add_(statistics["mean"])


def _unpacked(packed: Tensor, bits: int, channels: int) -> Tensor:
    half = -(-channels // 2)
    codes = _runs(packed[..., :half], 4, channels)
    return codes if bits == 4 else codes | (_runs(packed[..., half:], 2, channels) << 4)


def _runs(packed: Tensor, width: int, channels: int) -> Tensor:
    """``feature_store.format.codecs.group_quantise.unpack``."""
    shifts = range(0, 8, width)
    return torch.cat([(packed >> shift) & ((1 << width) - 1) for shift in shifts], dim=-1)[..., :channels]


def _top_k(parts: Parts, classes: int) -> Tensor:
    values, index = parts["values"].float(), parts[""]
    unsigned = {torch.int16: 0xFFFF, torch.int32: 0xFFFFFFFF}.get(index.dtype, -1)
    logits_BK = values[:, -1:].repeat(1, classes)
    return logits_BK.scatter_(1, index.long() & unsigned, values[:, :-1])
