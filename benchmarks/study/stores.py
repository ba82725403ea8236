"""Teachers and stores of the study, made when a question first needs them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.data import Images
from benchmarks.study.questions import STORES
from benchmarks.study.teacher import train_teacher
from benchmarks.study.tiers import Tier
from feature_store import RowId, open_store
from feature_store.backends.files import write_text
from feature_store.errors import ResourceError
from feature_store.tools.features import frequency_energy
from teacher_service.cache.job import cache
from teacher_service.config import CacheConfig, ComputeSpec, Inputs, StorageSpec, TeacherSpec, ViewSpec
from teacher_service.plan.forecast import forecast
from teacher_service.plan.survey import survey

SPECTRUM_ROWS = 1000  # images whose features' frequencies are measured
TIMED_SAMPLES = 256  # put through the pipeline before the first store, to predict what it takes
_SPECTRA = ("int8", "weak")  # one store of each teacher


class Workshop:
    """Makes teachers and stores, each once.

    Attributes:
        folder: Where the stores and runs of this tier lie.
        tier: Sizes.
        images: The data.
    """

    def __init__(self, out: Path, tier: Tier, images: Images) -> None:
        self.folder, self.tier, self.images = out / tier.name, tier, images
        self._teachers = out / "teachers"  # tiers of the same recipes share them

    def teacher(self, name: str) -> Path:
        """The teacher's checkpoint, trained if it is not there."""
        folder = self._teacher_folder(name)
        recipe, device = self.tier.teachers[name], self.tier.base["device"]
        train_teacher(recipe, self.images.all_train, self.images.val, folder, device)
        return folder / "teacher.safetensors"

    def _teacher_folder(self, name: str) -> Path:
        return self._teachers / f"{name}-{self.tier.teachers[name].epochs}-epochs"

    def store(self, name: str) -> Path:
        """A store of STORES, cached or continued if it is not whole; its report lies beside it.

        Raises:
            ResourceError: The job was told to stop.
        """
        path, report = self.folder / "stores" / name, self.folder / "stores" / f"{name}.json"
        if report.exists() and json.loads(report.read_text())["spec"] == asdict(STORES[name]):
            return path
        config = self._job(name, path)
        planned = forecast(survey(config), config).to_dict()
        done = cache(config)
        if done.units_left:  # told to stop
            raise ResourceError(f"store {name} is not whole yet; run the same command again")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(report, json.dumps({"spec": asdict(STORES[name]), "plan": planned, "job": asdict(done)}, indent=1))
        return path

    def _job(self, name: str, path: Path) -> CacheConfig:
        spec, tier = STORES[name], self.tier
        recipe = tier.teachers[spec.teacher]
        few = spec.few_labels
        return CacheConfig(
            inputs=Inputs(tars=self.images.few if few else self.images.train, labels="optional" if few else "required"),
            teacher=TeacherSpec(name=recipe.name, model_kwargs=recipe.model_kwargs or {}),
            checkpoint=self.teacher(spec.teacher),
            views=ViewSpec(
                count=tier.epochs if spec.all_views else tier.views,
                policy=tier.policy,  # pyright: ignore[reportArgumentType]
                policy_options=tier.policy_options,
            ),
            storage=StorageSpec(tap_codec=spec.codec),
            compute=ComputeSpec(
                batch_size=tier.cache_batch,
                workers=tier.base["workers"],
                device=tier.base["device"],
                time_samples=TIMED_SAMPLES if spec.all_views and tier.name != "tiny" else 0,
            ),
            store=path,
        )

    def reports(self) -> dict[str, Any]:
        """Reports of the teachers and stores that are made."""
        teachers = {name: self._teacher_folder(name) / "teacher.json" for name in self.tier.teachers}
        stores = {path.stem: json.loads(path.read_text()) for path in sorted(self.folder.glob("stores/*.json"))}
        for store in stores.values():
            for part in store.values():
                part.pop("store", None)  # a path of this machine
        return {
            "teachers": {name: json.loads(path.read_text()) for name, path in teachers.items() if path.exists()},
            "stores": stores,
            "spectra": {name: _spectrum(self.folder / "stores" / name) for name in stores if name in _SPECTRA},
        }


def _spectrum(path: Path) -> list[float]:
    """Mean magnitude of F^t by the larger of a spatial frequency's two indices."""
    store = open_store(path)
    samples = min(SPECTRUM_ROWS, store.manifest.tars[0].samples)
    rows = [RowId(0, position, 0) for position in range(samples)]
    energy_HW = frequency_energy(store.source(["stage4"]).read(rows).taps["stage4"], store.manifest.split.output_grid)
    height, width = np.indices(energy_HW.shape)
    larger = np.maximum(height, width)
    return [round(float(energy_HW[larger == index].mean()), 4) for index in range(larger.max() + 1)]
