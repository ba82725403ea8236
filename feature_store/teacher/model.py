"""The frozen teacher: from pixels to taps."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn

from feature_store.errors import InputError, Remedy, ResourceError
from feature_store.format.manifest import TeacherInfo
from feature_store.teacher.families import cut_model, find_family
from feature_store.teacher.own import build_own, is_own
from feature_store.teacher.split import LaterBlocks, WholeTeacher, no_later_blocks
from feature_store.teacher.taps import input_size
from feature_store.teacher.weights import CONVERT, explain_model_source, not_finite, python_objects, read_weights

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TeacherOutput:
    """Outputs of one forward pass, float32.

    Attributes:
        taps: [B, N, C] per tap: ``stage4`` (F^t, grid tokens after the final norm), ``stage3`` (grid tokens at the
            split), ``stage3_prefix`` where the later blocks need prefix tokens, and those named by block.
        logits: [B, classes], or None for a teacher without a classifier.
    """

    taps: dict[str, Tensor]
    logits: Tensor | None


class Teacher(nn.Module):
    """A frozen model with its split, always in eval mode.

    Attributes:
        info: Its description, as in the manifest.
        split: Where it is cut.
        taps: Shapes of every tap it can give.
        tap_shapes: (N, C) per tap it gives unless others are asked for.
        later_blocks: P of the paper, sharing this model's weights; None for a teacher that has none.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self, model: nn.Module, info: TeacherInfo, depth: int | None = None, *, drop_prefix: bool = False
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.info = info
        self.whole = whole_teacher(self.model, info, depth, drop_prefix=drop_prefix)
        self.later_blocks, self.split, self.taps = self.whole.later_blocks, self.whole.split, self.whole.shapes
        self.tap_shapes = self.taps.standard
        self.register_buffer("_mean", _pixel_scale(info.mean), persistent=False)
        self.register_buffer("_std", _pixel_scale(info.std), persistent=False)
        self.train(False)

    def tail(self) -> LaterBlocks:
        """The later blocks.

        Raises:
            InputError: It has none.
        """
        if self.later_blocks is None:
            raise no_later_blocks(self.info.name)
        return self.later_blocks

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode: a trainer's call has no effect."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels_BHWC: Tensor, taps: Sequence[str] | None = None) -> TeacherOutput:
        """Taps and logits of uint8 RGB pixels, normalised on the teacher's device.

        Args:
            pixels_BHWC: The pixels.
            taps: Names of the taps that are wanted; default those of ``tap_shapes``.

        Raises:
            InputError: The pixels are not uint8 [B, H, W, 3] of the teacher's input size.
        """
        expected = (*self.info.input_size, 3)
        if pixels_BHWC.dtype != torch.uint8 or pixels_BHWC.ndim != 4 or tuple(pixels_BHWC.shape[1:]) != expected:
            raise InputError(
                f"the teacher takes uint8 pixels [B, {expected[0]}, {expected[1]}, 3], "
                f"got {pixels_BHWC.dtype} {tuple(pixels_BHWC.shape)}"
            )
        images_BCHW = normalise(pixels_BHWC.to(self._mean.device), self._mean, self._std)
        with self._autocast():
            features, given = self.whole(images_BCHW, tuple(self.tap_shapes) if taps is None else taps)
            logits = self.model.forward_head(features) if self.info.num_classes else None  # pyright: ignore[reportCallIssue]
        return TeacherOutput(given, None if logits is None else logits.float())

    def _autocast(self) -> Any:
        if self.info.compute_dtype == "float32":
            return nullcontext()
        return torch.autocast(self._mean.device.type, COMPUTE_DTYPES[self.info.compute_dtype])


def whole_teacher(
    model: nn.Module, info: TeacherInfo, depth: int | None = None, *, drop_prefix: bool = False
) -> WholeTeacher:
    """A model with the later blocks of its family; without, if it is of no known family or a user's own.

    Args:
        model: The model, in eval mode; may be on the meta device.
        info: Its name and input size.
        depth: Number of later blocks, see split_teacher.
        drop_prefix: See split_teacher.

    Raises:
        InputError: An impossible depth, options of later blocks for a model without, or no intermediate maps.
    """
    if not is_own(info.name) and find_family(model) is not None:
        cut = cut_model(model, depth, drop_prefix=drop_prefix)
    elif depth or drop_prefix:
        raise InputError(f"{no_later_blocks(info.name)}; leave out depth and drop_prefix")
    else:
        cut = None
    return WholeTeacher(model, cut, info.input_size)


def load_teacher(
    name: str,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    depth: int | None = None,
    drop_prefix: bool = False,
    compute_dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> Teacher:
    """Build a teacher and load its weights.

    Args:
        name: timm model name, with or without a pretrained tag; or ``package.module:build``, your own function,
            which is imported and called. Never a name that only a store says.
        checkpoint: Local weights, safetensors or torch (read with ``weights_only=True``); rules over pretrained.
        pretrained: Fetch timm's own weights for this name.
        model_kwargs: Extra arguments of ``timm.create_model``, or of that function.
        depth: Number of later blocks of a plain ViT, see split_teacher.
        drop_prefix: Students run them on grid tokens alone, see split_teacher.
        compute_dtype: float32, or bfloat16/float16 by autocast.
        device: Where the teacher runs.

    Raises:
        InputError: Unknown name, impossible arguments, or a checkpoint that does not fit.
        ResourceError: The pretrained weights could not be fetched.
    """
    if compute_dtype not in COMPUTE_DTYPES:
        raise InputError(f"unknown compute dtype {compute_dtype!r}; expected one of {', '.join(COMPUTE_DTYPES)}")
    model = create_model(name, model_kwargs, pretrained=pretrained and checkpoint is None)
    if checkpoint is not None:
        _load_checkpoint(model, name, checkpoint)
    info = teacher_info(model, name, model_kwargs, compute_dtype, weights_sha256(model.state_dict()))
    return Teacher(model, info, depth, drop_prefix=drop_prefix).to(device)


def prepare_for_gpu(teacher: Teacher) -> None:
    """Lay its convolutions out channels-last, and use fused attention also where timm leaves it off (Swin)."""
    teacher.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for module in teacher.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True  # pyright: ignore[reportArgumentType]


def create_model(name: str, model_kwargs: Mapping[str, Any] | None = None, *, pretrained: bool = False) -> nn.Module:
    """A teacher's model: timm's, or a user's own, whose function loads its weights itself.

    Raises:
        InputError: See build_model and build_own.
        ResourceError: The pretrained weights could not be fetched.
    """
    if is_own(name):
        return build_own(name, model_kwargs or {})
    return build_model(name, model_kwargs, pretrained=pretrained)


def build_model(name: str, model_kwargs: Mapping[str, Any] | None = None, *, pretrained: bool = False) -> nn.Module:
    """``timm.create_model`` with this project's errors.

    Raises:
        InputError: Unknown name or impossible arguments.
        ResourceError: The pretrained weights could not be fetched.
    """
    if name.partition(":")[0] in ("hf-hub", "hf_hub", "local-dir"):
        raise InputError(explain_model_source(name))
    architecture, _, tag = name.partition(".")
    if not timm.is_model(name):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}" if close else "see timm.list_models()"
        raise InputError(f"timm {timm.__version__} knows no model {name!r}; {hint}", remedy=Remedy.LIST_TEACHERS)
    kwargs = dict(model_kwargs or {})
    checkpoint = kwargs.pop("checkpoint_path", None)
    try:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(
            f"the pretrained weights of {name!r} could not be fetched ({reason}); "
            "check the network or pass a local file",
            remedy=Remedy.LOCAL_CHECKPOINT,
        ) from error
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        if "weights_only" in str(error):  # torch's text explains how to switch the guard off
            raise InputError(f"the weights file of {name!r} {python_objects(error)}; {CONVERT}") from error
        if "Invalid pretrained tag" in str(error):
            tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
            expected = f"expected one of {', '.join(tags)}" if tags else "it has none: leave the tag out"
            raise InputError(f"timm knows no pretrained tag {tag!r} of {architecture}; {expected}") from error
        raise InputError(f"timm cannot build {name!r} with {kwargs}: {error}") from error
    if checkpoint:
        _load_checkpoint(model, name, Path(checkpoint))
    if size := kwargs.get("img_size"):  # few of timm's classes say the size they were built for
        height, width = (size, size) if isinstance(size, int) else size
        described: Any = model
        described.pretrained_cfg = {**described.pretrained_cfg, "input_size": (3, height, width)}
    return model


def _load_checkpoint(model: nn.Module, name: str, checkpoint: Path) -> None:
    as_numpy = checkpoint.suffix.lower() in (".npz", ".npy") and checkpoint.is_file()  # JAX's, per model in timm
    weights = {} if as_numpy else read_weights(checkpoint)
    try:
        if as_numpy:
            load_checkpoint(model, str(checkpoint))
        else:
            model.load_state_dict(weights)
    except Exception as error:  # readers raise many classes on damaged or foreign files
        # torch names every key, a large model has hundreds
        lines = [shorten(line.strip(" \t:."), 200, placeholder=" ...") for line in str(error).splitlines()[:4]]
        reason = "; ".join(lines)
        raise InputError(
            f"checkpoint {checkpoint} does not fit {name}: {reason}; "
            "check the model name and its arguments (num_classes, img_size...)",
            remedy=Remedy.MODEL_OPTIONS,
        ) from error
    if broken := not_finite(model):
        raise InputError(
            f"checkpoint {checkpoint} has NaN or infinite values in {len(broken)} tensors, first {broken[0]}; "
            "give one from before the training diverged"
        )


def teacher_info(
    model: nn.Module, name: str, model_kwargs: Mapping[str, Any] | None, compute_dtype: str, sha256: str
) -> TeacherInfo:
    """TeacherInfo of a model, whose weights may be on the meta device if sha256 is given.

    Raises:
        InputError: It does not see RGB images, or has logits for each token.
    """
    if getattr(model, "in_chans", 3) != 3:
        raise InputError(f"{name} takes images of {model.in_chans} channels, but views are RGB; leave out in_chans")
    if getattr(model, "num_classes", 0) and getattr(model, "global_pool", None) == "":
        raise InputError(f"{name} with global_pool '' has logits for each token; leave it out, or give num_classes 0")
    data = resolve_model_data_config(model)
    return TeacherInfo(
        name=name,
        model_kwargs=json.loads(json.dumps(dict(model_kwargs or {}))),
        weights_sha256=sha256,
        input_size=input_size(model),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        num_classes=int(getattr(model, "num_classes", 0)),
        compute_dtype=compute_dtype,
    )


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and bytes of a state dict, in sorted order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()


def normalise(pixels_BHWC: Tensor, mean_255: Tensor, std_255: Tensor) -> Tensor:
    """uint8 pixels [B, H, W, 3] to normalised float32 images [B, 3, H, W]; mean and std on the 0..255 scale."""
    images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return images_BCHW.sub_(mean_255.view(-1, 1, 1)).div_(std_255.view(-1, 1, 1))  # a copy, as the dtypes differ


def _pixel_scale(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32) * 255.0
