"""Views beside what the teacher made of them, read back from the store and shown as PCA colours.

Shape legend: R rows, H W pixels or grid, N tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from demo.plots import Theme, png, themed
from feature_store import RowId, Store
from feature_store.inputs.tar import open_tars
from feature_store.teacher.model import load_teacher
from student_trainer.data.batch import ViewDataset, match_tars
from student_trainer.data.replayed import StoredViews

_FITTED_SAMPLES = 64  # of the first tar, all views: what the colours are fitted on
_SHOWN_SAMPLES = 2
_SHOWN_VIEWS = 4


@dataclass(frozen=True)
class FeatureMaps:
    """Some views and their maps.

    Attributes:
        names: Name of each shown view.
        pixels: uint8 [R, H, W, 3].
        stage3: Colours of the stage-3 output, 0..1, [R, H, W, 3].
        stage4: Colours of the final map F^t, 0..1, [R, H, W, 3].
        variance: Part of the final map's variance that three colours show.
    """

    names: list[str]
    pixels: np.ndarray
    stage3: np.ndarray
    stage4: np.ndarray
    variance: float


def read_feature_maps(store: Store, tars: Sequence[str], checkpoint: Path) -> FeatureMaps:
    """Views of the first samples, the final map from the store, the stage-3 output (not stored) from the teacher."""
    samples = min(_FITTED_SAMPLES, store.manifest.tars[0].samples)
    views = min(_SHOWN_VIEWS, store.manifest.num_views)
    rows = [RowId(0, position, view) for position in range(samples) for view in range(views)]
    batch = ViewDataset(match_tars(store, open_tars(tars)), StoredViews(store, check_all=True))[rows]
    info, split = store.manifest.teacher, store.manifest.split
    teacher = load_teacher(info.name, checkpoint=checkpoint, model_kwargs=info.model_kwargs)
    stage3, _ = _colours(teacher(batch.pixels).taps["stage3"], split.input_grid)
    stage4, variance = _colours(store.source(["stage4"]).read(rows).taps["stage4"], split.output_grid)
    shown = slice(_SHOWN_SAMPLES * views)
    labels = batch.labels[shown].tolist()
    names = [f"a {label}, view {row.view}" for label, row in zip(labels, rows[shown], strict=True)]
    return FeatureMaps(names, batch.pixels[shown].numpy(), stage3[shown], stage4[shown], variance)


def _colours(tokens_RNC: torch.Tensor | np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Tokens' first three principal components as red, green and blue, and the variance these hold."""
    tokens = np.asarray(tokens_RNC, np.float32)
    pca = PCA(3, random_state=0)
    components = pca.fit_transform(tokens.reshape(-1, tokens.shape[2]))
    low, high = np.percentile(components, [1, 99], axis=0)
    scaled = np.clip((components - low) / (high - low), 0, 1)
    return scaled.reshape(len(tokens), *grid, 3), float(pca.explained_variance_ratio_.sum())


def feature_map_rows(maps: FeatureMaps, theme: Theme) -> bytes:
    """Three rows of pictures: views, stage-3 outputs, final maps."""
    rows = {"view": maps.pixels, "stage 3": maps.stage3, "final map": maps.stage4}
    with mpl.rc_context(themed(theme)):
        figure = Figure(figsize=(8, 3.5), layout="constrained")
        grid = figure.subplots(len(rows), len(maps.names), squeeze=False)
        for line, (name, pictures) in zip(grid, rows.items(), strict=True):
            line[0].set_ylabel(f"{name}\n{pictures.shape[1]} x {pictures.shape[2]}")
            for axes, picture in zip(line, pictures, strict=True):
                axes.imshow(picture, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
        for axes, name in zip(grid[0], maps.names, strict=True):
            axes.set_title(name, fontsize=8)
        return png(figure)
