"""The same labelled images as a class-per-folder tree, tars and parquet files."""

import json
from collections.abc import Sequence
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


def write_parquet(
    path: Path, samples: list[Sample], *, group_rows: int = 3, names: Sequence[str] | None = CLASSES
) -> Path:
    """The samples as a parquet file of the datasets library; labels of samples without cls are null."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(image_table(samples, names), path, row_group_size=group_rows)
    return path


def image_table(samples: list[Sample], names: Sequence[str] | None = CLASSES):
    """Columns image {bytes, path} and label, with class names in the schema."""
    import pyarrow as pa

    images = [{"bytes": sample["png"], "path": None} for sample in samples]
    labels = [int(sample["cls"]) if "cls" in sample else None for sample in samples]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels, pa.int64())})
    label = {"_type": "ClassLabel", "names": list(names)} if names else {"_type": "Value", "dtype": "int64"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(features)})
