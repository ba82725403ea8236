"""Optional dependencies, by the extra that installs them."""

from collections.abc import Mapping

from feature_store.errors import InputError

DISTRIBUTION = "scalekd-cache"
MODULES: Mapping[str, tuple[str, ...]] = {
    "teacher": ("torch", "timm", "torchvision", "safetensors"),
    "student": ("torch", "timm", "torchvision", "safetensors", "scipy", "ruamel", "jinja2"),
    "serve": ("fastapi", "starlette", "uvicorn", "anyio"),
    "ray": ("ray",),
    "s3": ("obstore", "boto3", "botocore"),
    "hf": ("huggingface_hub",),
    "parquet": ("pyarrow",),
    "mlflow": ("mlflow",),
    "plot": ("matplotlib", "jinja2", "scipy"),
    "report": ("matplotlib",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "coco": ("pycocotools",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
}
"""Top-level modules that each extra of pyproject.toml brings, where the package without extras lacks them."""


def missing_extra(error: ModuleNotFoundError, preferred: str = "") -> InputError | None:
    """The error that names the extra to install; None if no extra has the missing module.

    Args:
        error: Error of an import.
        preferred: The extra to name where several have the module.
    """
    module = (error.name or "").partition(".")[0]
    extras = [extra for extra, modules in MODULES.items() if module in modules]
    if not extras:
        return None
    extra = preferred if preferred in extras else extras[0]
    return InputError(f"{module} is not installed; {install(extra)}")


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
