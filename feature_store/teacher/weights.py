"""Weight files, read without running any code in them."""

import argparse
import json
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from feature_store.errors import InputError

CONVERT = (
    "save its tensors alone as a safetensors file once, where the file's origin is trusted and the code that wrote it "
    "is installed, and give that file"
)
_AGAIN = "copy or download it again"
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # where timm looks for tensors, in its order
_MAGIC = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "fetch them with `git lfs pull`"),
    (b"<", "a web page or XML text, such as a login or error page", "download the file itself"),
    (b"{", "JSON text, such as the index of a model in several files", "give one file that holds all weights"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it", "give a safetensors or torch file"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
)


def read_weights(path: Path) -> dict[str, Any]:
    """Tensors by name out of a safetensors or torch file, also from below a key such as ``state_dict``.

    Raises:
        InputError: The file is not one of these, is damaged, or holds more than tensors; names its content.
    """
    content = read_file(path)
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if isinstance(content, Mapping) and isinstance(content.get("weights"), Mapping) and "student" in content:
        raise InputError(f"checkpoint {path} is a training run's, which holds more than a model; export the run first")
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        names = f" of {', '.join(map(str, list(content)[:5])) or 'nothing'}" if isinstance(content, Mapping) else ""
        raise InputError(
            f"checkpoint {path} holds a {type(content).__name__}{names}, expected tensors by name; {CONVERT}"
        )
    return clean_state_dict(dict(content))


def read_file(path: Path) -> Any:
    """Content of a safetensors or torch file, on the CPU; its first bytes decide which of the two it is.

    Raises:
        InputError: It is neither, is damaged, or holds Python objects, which loading would execute.
    """
    _require_file(path)
    with path.open("rb") as file:
        head = file.read(512)
    if _is_safetensors(head):
        return _read_safetensors(path)
    _refuse_others(path, head)
    try:
        # timm's own training checkpoints hold their arguments as a Namespace
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its text explains how to switch the guard off
        if not head.startswith((b"PK", b"\x80")):
            raise _damaged(path) from error
        raise InputError(f"checkpoint {path} {python_objects(error)}; {CONVERT}") from error
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise _damaged(path) from error


def python_objects(error: Exception) -> str:
    """Torch's refusal of a pickle without its advice to switch the check off."""
    found = re.search(r"GLOBAL (\S+)|[Gg]lobals: ([^\s,]+?)\.?(?:[\s,]|$)", str(error))
    named = f" ({found[1] or found[2]})" if found else ""
    return f"holds Python objects beside tensors{named}, and loading those can run any code"


def not_finite(model: nn.Module) -> list[str]:
    """Names of parameters with NaN or infinite values, and of buffers with NaN; masks may hold infinities.

    A model on the meta device, which has no values, has none of these.
    """
    parameters = {name: value.isfinite().all() for name, value in model.named_parameters() if not value.is_meta}
    buffers = {name: ~value.isnan().any() for name, value in model.named_buffers() if not value.is_meta}
    return [name for name, fine in (parameters | buffers).items() if not fine]


def _require_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"checkpoint {path} is not a file: {reason}; give a safetensors or torch file") from error
    if stat.S_ISDIR(mode):
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        which = f"a file in it: {', '.join(inside[:5])}" if inside else "a safetensors or torch file; it holds none"
        raise InputError(f"checkpoint {path} is not a file but a folder; give {which}")
    if not stat.S_ISREG(mode):
        raise InputError(f"checkpoint {path} is not a file but a pipe or device; give a regular file")
    if not path.stat().st_size:
        raise InputError(f"checkpoint {path} is empty; {_AGAIN}")


def _is_safetensors(head: bytes) -> bool:
    """A header's length as eight bytes, then the header, which is JSON."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000  # the format's own limit


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError and what torch raises
        raise InputError(f"checkpoint {path} is a damaged safetensors file: {error}; {_AGAIN}") from error


def _refuse_others(path: Path, head: bytes) -> None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, what, remedy in _MAGIC:
        if text.startswith(magic):
            raise InputError(f"checkpoint {path} is {what}; {remedy}")
    if head[257:262] == b"ustar":
        raise InputError(f"checkpoint {path} is a tar archive; unpack it")
    if path.suffix == ".safetensors":
        raise _damaged(path)
    if not head.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise InputError(
            f"checkpoint {path} is a zip or torch file cut short at {path.stat().st_size} bytes, or damaged; {_AGAIN}"
        ) from error
    if any("/code/" in f"/{name}" for name in names):
        raise InputError(f"checkpoint {path} is a TorchScript archive, which holds code; {CONVERT}")
    if not any(name.endswith("data.pkl") for name in names):
        raise InputError(f"checkpoint {path} is a zip archive that torch did not write; unpack it")


def _damaged(path: Path) -> InputError:
    return InputError(f"checkpoint {path} is no safetensors or torch file, or is damaged; {_AGAIN}")


def explain_model_source(name: str) -> str:
    """Why a name of timm's ``hf-hub:`` or ``local-dir:`` form is refused, and what to give instead."""
    source, _, place = name.partition(":")
    why = f"model name {name!r} depends on what lies at {place}, but stores and runs name models by architecture"
    if source == "local-dir" and (described := Path(place) / "config.json").is_file():
        try:
            config = json.loads(described.read_text())
            arguments = json.dumps({"num_classes": config["num_classes"], **(config.get("model_args") or {})})
            return (
                f"{why}; give the name {config['architecture']!r}, the arguments {arguments} and the weights file there"
            )
        except (ValueError, KeyError, TypeError):
            pass
    return f"{why}; give the architecture as in its config.json, and download the weights to give them as a file"
