"""The same labelled images as a class-per-folder tree, tars and parquet files."""

from pathlib import Path

from tiny_jobs import Sample, noise_samples, write_tar

CLASSES = ("ant", "bee", "cat", "dog")


def class_samples(count: int, seed: int = 0) -> list[Sample]:
    """Samples with keys ``<class>/s000``, labels by sorted class names."""
    return [
        {**sample, "__key__": f"{CLASSES[i % 4]}/{sample['__key__']}"}
        for i, sample in enumerate(noise_samples("s", count, seed))
    ]


def write_folder(root: Path, samples: list[Sample]) -> Path:
    """The samples as files below their class folders."""
    for sample in samples:
        path = root / f"{sample['__key__']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample["png"])
    return root


def write_class_tars(folder: Path, samples: list[Sample], per_tar: int) -> list[str]:
    """The samples as tars."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_tar(folder / f"t{start:03}.tar", samples[start : start + per_tar])
        for start in range(0, len(samples), per_tar)
    ]
