"""A trained student as plain timm weights: projectors dropped, nothing of this project needed to load them."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from feature_store.errors import InputError, MismatchError
from feature_store.files import replacing
from student_trainer.trained import Trained, load_student

_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A trained student as a plain timm checkpoint.

    Attributes:
        run: Folder of the training run, or one of its checkpoint files.
        out: Folder to write model.safetensors and config.json to.
        onnx: Also write model.onnx, and compare it with the student in onnxruntime.
        backbone: Also write backbone.safetensors: the weights without the classifier, for detection and segmentation.
    """

    run: Path
    out: Path
    onnx: bool = False
    backbone: bool = False


def export(config: ExportConfig) -> list[Path]:
    """Write the student; load it with ``timm.create_model(name, checkpoint_path=OUT/model.safetensors, ...)``.

    ``timm.create_model("local-dir:OUT", pretrained=True)`` needs no further arguments: config.json carries them.

    Returns:
        The files written.

    Raises:
        InputError: The folder exists and is not empty, there is no checkpoint, or onnx is not installed.
    """
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise InputError(f"--out {config.out} already exists; choose another folder or remove it")
    if config.onnx:
        _require_onnx()
    trained = load_student(config.run)
    model = trained.student.model.eval()
    save_for_hf(
        model,
        str(config.out),
        model_config={"pretrained_cfg": _pretrained_config(trained)},
        model_args={k: v for k, v in trained.student.model_kwargs.items() if k != "num_classes"},
        safe_serialization=True,
    )
    weights = config.out / "model.safetensors"
    with replacing(weights) as partial:  # safetensors makes files that only their owner can read
        weights.replace(partial)
    if config.backbone:
        with replacing(config.out / "backbone.safetensors") as partial:
            save_file(backbone_state(model), partial)
    if config.onnx:
        _export_onnx(model, trained.preprocessing.input_size, config.out / "model.onnx")
    return sorted(config.out.iterdir())


def backbone_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A timm model's weights without its classifier, by timm's names (for plain ResNets torchvision's too)."""
    classifiers: str | tuple[str, ...] = getattr(model, "pretrained_cfg")["classifier"]  # noqa: B009 - set by timm
    names = (classifiers,) if isinstance(classifiers, str) else classifiers
    prefixes = tuple(f"{name}." for name in names)
    return {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith(prefixes)}


def _pretrained_config(trained: Trained) -> dict[str, object]:
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
        raise InputError(f"--onnx needs {', '.join(absent)}; install with `pip install .[onnx]`")


def _export_onnx(model: nn.Module, input_size: tuple[int, int], path: Path) -> None:
    """Write model.onnx with a free batch axis, and hold its logits against torch's."""
    images = torch.randn(2, 3, *input_size, generator=torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        model,
        (images,),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    with torch.no_grad():
        expected = model(images)
    got = torch.from_numpy(_run_onnx(path, images))
    difference = (got - expected).abs().max().item()
    if difference > 1e-3 * max(1.0, expected.abs().max().item()):
        path.unlink()
        raise MismatchError(
            "logits of model.onnx",
            where="torch",
            expected=expected[0, :3].tolist(),
            got=got[0, :3].tolist(),
            remedy="model.onnx was removed; try another version of torch or onnxruntime",
        )


def _run_onnx(path: Path, images: torch.Tensor):
    import onnxruntime  # pyright: ignore[reportMissingImports] - optional extra

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.numpy()})[0]
