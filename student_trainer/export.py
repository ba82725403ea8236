"""Export of a trained student as plain weights of its library."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from feature_store.backends.files import replacing
from feature_store.errors import InputError, MismatchError, one_line
from feature_store.tools.options import check_fields
from student_trainer.students.load import LoadedStudent, load_student
from student_trainer.students.torchvision_network import TorchvisionNetwork

_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A trained student as a plain timm checkpoint.

    Attributes:
        run: Folder of the training run, or one of its checkpoint files.
        out: Folder to write model.safetensors and config.json to.
        onnx: Also write model.onnx, and compare it with the student in onnxruntime; torch 2.6 cannot.
        backbone: Also write backbone.safetensors: the weights without the classifier, for detection and segmentation.
    """

    run: Path
    out: Path
    onnx: bool = False
    backbone: bool = False

    def __post_init__(self) -> None:
        """Refuse values of another type."""
        check_fields(self)


def export(config: ExportConfig) -> list[Path]:
    """Write the student; load it with ``timm.create_model(name, checkpoint_path=OUT/model.safetensors, ...)``.

    ``timm.create_model("local-dir:OUT", pretrained=True)`` needs no further arguments: config.json carries them (timm
    1.0.31 or newer). A network of torchvision is written by torchvision's names:
    ``torchvision.models.get_model(NAME, num_classes=K).load_state_dict(load_file(OUT/model.safetensors))``.

    Returns:
        The files written.

    Raises:
        InputError: The folder exists and is not empty, there is no checkpoint, onnx is not installed, or torch cannot
            export this model to it.
        FailedError: The student's weights are not finite.
        MismatchError: model.onnx gives other logits than the student.
    """
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise InputError(f"--out {config.out} already exists; choose another folder or remove it")
    if config.onnx:
        _require_onnx()
    trained = load_student(config.run)
    model = trained.student.model.eval()
    arguments = {k: v for k, v in trained.student.model_kwargs.items() if k != "num_classes"}
    if isinstance(model, TorchvisionNetwork):
        _save_torchvision(model, trained, arguments, config.out)
    else:
        how = {"pretrained_cfg": {**_pretrained_config(trained), **_NOT_OURS}, "label_names": _label_names(trained)}
        save_for_hf(model, str(config.out), model_config=how, model_args=arguments, safe_serialization=True)
    weights = config.out / "model.safetensors"
    with replacing(weights) as partial:  # safetensors makes files that only their owner can read
        weights.replace(partial)
    if config.backbone:
        with replacing(config.out / "backbone.safetensors") as partial:
            save_file(backbone_state(model), partial)
    if config.onnx:
        _export_onnx(model, trained.student.name, trained.preprocessing.input_size, config.out / "model.onnx")
    return sorted(config.out.iterdir())


def _label_names(trained: LoadedStudent) -> list[str]:
    """Names of all classes; none where only some are known."""
    return list(trained.classes) if len(trained.classes) == trained.num_classes else []


_NOT_OURS = dict.fromkeys(("tag", "license", "origin_url"))
"""Fields in which timm describes its own weights of an architecture."""


def backbone_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A network's weights without its classifier, by its library's names, which for plain ResNets are the same."""
    if isinstance(model, TorchvisionNetwork):
        return {k: v.contiguous() for k, v in model.backbone_weights().items()}
    classifiers: str | tuple[str, ...] = getattr(model, "pretrained_cfg")["classifier"]  # noqa: B009 - set by timm
    names = (classifiers,) if isinstance(classifiers, str) else classifiers
    prefixes = tuple(f"{name}." for name in names)
    return {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith(prefixes)}


def _save_torchvision(
    model: TorchvisionNetwork, trained: LoadedStudent, arguments: Mapping[str, Any], out: Path
) -> None:
    """Weights by torchvision's names, and a description as of a timm model."""
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.weights().items()}, out / "model.safetensors")
    described = {
        "architecture": trained.student.name,
        "num_classes": trained.num_classes,
        "model_args": dict(arguments),
        "pretrained_cfg": _pretrained_config(trained),
        **({"label_names": names} if (names := _label_names(trained)) else {}),
    }
    (out / "config.json").write_text(json.dumps(described, indent=2))


def _pretrained_config(trained: LoadedStudent) -> dict[str, object]:
    """Preprocessing in timm's words."""
    how = trained.preprocessing
    return {
        "input_size": (3, *how.input_size),
        "mean": tuple(how.mean),
        "std": tuple(how.std),
        "interpolation": how.interpolation,
        "crop_pct": how.crop_pct,
        "num_classes": trained.num_classes,
    }


def _require_onnx() -> None:
    absent = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if absent:
        raise InputError(f"--onnx needs {', '.join(absent)}; install with `pip install 'scalekd-cache[onnx]'`")


def _export_onnx(model: nn.Module, name: str, input_size: tuple[int, int], path: Path) -> None:
    """Write model.onnx with a free batch axis, and hold its logits against torch's.

    Raises:
        InputError: torch cannot export this model.
        MismatchError: The exported model gives other logits.
    """
    images = torch.randn(2, 3, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    with replacing(path) as partial:
        try:
            _write_onnx(model, images, partial)
            got = torch.from_numpy(_run_onnx(partial, images))
        except Exception as error:  # torch's exporter and onnxruntime raise nearly anything
            reason = one_line(error.__cause__ or error)
            raise InputError(
                f"--onnx: torch {torch.__version__} cannot export {name} to ONNX ({reason}); "
                f"the other files in {path.parent} are whole: use them, or try another version of torch and onnxscript"
            ) from error
        difference = (got - expected).abs().max().item()
        if not difference <= 1e-3 * max(1.0, expected.abs().max().item()):
            raise MismatchError(
                "logits of model.onnx",
                where="torch",
                expected=expected[0, :3].tolist(),
                got=got[0, :3].tolist(),
                remedy="model.onnx was removed; try another version of torch or onnxruntime",
            )


def _write_onnx(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    with _plain_attention(model), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            model,
            (images,),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention as matrix products in the context: torch's exporter fails at fused kernels (BEiT, Hiera, MaxViT)."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        vars(module)["fused_attn"] = False
    try:
        yield
    finally:
        for module in fused:
            vars(module)["fused_attn"] = True


def _run_onnx(path: Path, images: torch.Tensor):
    import onnxruntime  # pyright: ignore[reportMissingImports] - optional extra

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.numpy()})[0]
