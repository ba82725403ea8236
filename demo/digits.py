"""scikit-learn's handwritten digits (real scans, 8 x 8 pixels) as webdataset tars."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from demo.settings import CLASSES, SIDE, Settings

_BRIGHTEST = 16  # value of a white pixel in the original scans


@dataclass(frozen=True)
class Digits:
    """The data as files.

    Attributes:
        train_tars: Training tars; samples are in random order.
        test_tars: Test tars.
        few_keys: Text file with the keys of the few labelled samples, one per line.
        train_images: Images in the training tars.
        few_images: Keys in few_keys.
        test_images: Images in the test tars.
    """

    train_tars: tuple[str, ...]
    test_tars: tuple[str, ...]
    few_keys: Path
    train_images: int
    few_images: int
    test_images: int


def write_digits(folder: Path, settings: Settings) -> Digits:
    """Write tars and the list of few keys; the split is evenly over classes and the same every time."""
    folder.mkdir(parents=True)
    digits = load_digits()
    scans, labels = digits.images, digits.target  # pyright: ignore[reportAttributeAccessIssue] - a Bunch
    split = train_test_split(
        np.arange(len(labels)), test_size=settings.test_images, stratify=labels, random_state=settings.seed
    )
    train, test = map(np.asarray, split)
    if settings.train_per_class is not None:
        train = _first_per_class(train, labels, settings.train_per_class)
    few = _first_per_class(train, labels, settings.few_per_class)
    few_keys = folder / "few-labels.txt"
    few_keys.write_text("".join(f"{_key(i)}\n" for i in few))
    return Digits(
        train_tars=_write_tars(folder / "train", train, scans, labels, settings.tar_samples),
        test_tars=_write_tars(folder / "test", test, scans, labels, settings.tar_samples),
        few_keys=few_keys,
        train_images=len(train),
        few_images=len(few),
        test_images=len(test),
    )


def _first_per_class(indices: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The first indices of every class, as many of each, in their old order."""
    of_class = [np.flatnonzero(labels[indices] == digit)[:count] for digit in range(CLASSES)]
    return indices[np.sort(np.concatenate(of_class))]


def _write_tars(
    prefix: Path, indices: np.ndarray, scans: np.ndarray, labels: np.ndarray, tar_samples: int
) -> tuple[str, ...]:
    paths = []
    for number, start in enumerate(range(0, len(indices), tar_samples)):
        path = f"{prefix}-{number:03d}.tar"
        with webdataset.TarWriter(path, mtime=0) as tar:  # pyright: ignore[reportAttributeAccessIssue]
            for i in indices[start : start + tar_samples]:
                tar.write({"__key__": _key(i), "png": _png(scans[i]), "cls": str(labels[i]).encode()})
        paths.append(path)
    return tuple(paths)


def _key(index: int) -> str:
    """Sample key: the scan's number in scikit-learn's data set."""
    return f"digit-{index:04d}"


def _png(scan: np.ndarray) -> bytes:
    """A scan as a PNG, enlarged smoothly."""
    grey = Image.fromarray(np.round(scan * (255 / _BRIGHTEST)).astype(np.uint8))
    encoded = BytesIO()
    grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(encoded, "PNG")
    return encoded.getvalue()
