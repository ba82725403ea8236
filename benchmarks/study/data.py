"""Images of the study: the data set's tars, and copies with few labels."""

import io
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.tiers import Tier
from feature_store.backends.files import replacing
from feature_store.errors import InputError
from feature_store.inputs.tar import open_tars


@dataclass(frozen=True)
class Images:
    """Tars of the study.

    Attributes:
        all_train: All training tars; the teachers'.
        train: The students' tars.
        val: Test tars.
        few: Copies of the students' tars in which few samples have a label.
        few_keys: Text file of the keys of those.
        few_labels: Their number.
        samples: Samples in the students' tars.
    """

    all_train: tuple[str, ...]
    train: tuple[str, ...]
    val: tuple[str, ...]
    few: tuple[str, ...]
    few_keys: Path
    few_labels: int
    samples: int


def prepare_images(data: Path, folder: Path, tier: Tier) -> Images:
    """Find the tars ``*train*.tar*`` and ``*val*.tar*`` of a folder; write the copies once.

    Raises:
        InputError: The folder holds no such tars.
    """
    found = {part: sorted(str(path) for path in data.glob(f"*{part}*.tar*")) for part in ("train", "val")}
    for part, tars in found.items():
        if not tars:
            raise InputError(f"--data {data} holds no *{part}*.tar*; give a folder of webdataset tars, train and val")
    train = tuple(found["train"][: tier.train_tars])
    labels = {tar: _labels(tar) for tar in train}
    keys = _few_keys(labels, tier.few_per_class)
    folder.mkdir(parents=True, exist_ok=True)
    few_keys = folder / "few-labels.txt"
    few_keys.write_text("".join(f"{key}\n" for key in sorted(keys)))
    few = tuple(str(folder / f"few-{number:03d}.tar") for number in range(len(train)))
    for source, copy in zip(train, few, strict=True):
        if not Path(copy).exists():
            _copy_with_labels_of(source, Path(copy), keys)
    samples = sum(map(len, labels.values()))
    return Images(tuple(found["train"]), train, tuple(found["val"]), few, few_keys, len(keys), samples)


def _labels(tar: str) -> dict[str, int]:
    (opened,) = open_tars([tar])
    return {key: opened.label(position) for position, key in enumerate(opened.keys)}


def _few_keys(labels: Mapping[str, Mapping[str, int]], per_class: int) -> frozenset[str]:
    """The first keys of every class, in the order of the tars."""
    seen: Counter[int] = Counter()
    keys = []
    for key, label in (item for tar in labels.values() for item in tar.items()):
        seen[label] += 1
        if seen[label] <= per_class:
            keys.append(key)
    return frozenset(keys)


def _copy_with_labels_of(source: str, copy: Path, keys: frozenset[str]) -> None:
    """Copy images, and labels of the chosen samples only; the json members, which hold labels too, are left out."""
    with (
        replacing(copy) as partial,
        tarfile.open(source) as tar,
        tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as out,
    ):
        for member in tar:
            key, _, extension = Path(member.name).name.partition(".")
            if extension == "json" or (extension == "cls" and key not in keys):
                continue
            content = tar.extractfile(member)
            assert content is not None, member.name
            out.addfile(_plain(member), io.BytesIO(content.read()))


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    plain = tarfile.TarInfo(member.name)
    plain.size = member.size
    return plain
