"""Statistics of features: frequencies, channels, principal colours.

Shape legend: n rows, H W grid, N = H*W tokens, C channels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from feature_store.errors import InputError
from feature_store.format.addressing import RowId, Rows, row_array, row_ids
from feature_store.tools.extras import install
from feature_store.views import check_pixels, decode_image, replay_view

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feature_store.inputs.base import SampleSource
    from feature_store.store import Store

INSTALL = install("plot")


def frequency_energy(features_nNC: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Magnitude of each spatial frequency, averaged over channels and rows: [H, W] (Fig. 2 and 5 of the paper).

    Orthonormal DCT-II of each channel's map; [0, 0] is the direct component, a channel's mean over tokens times
    sqrt(N).

    Raises:
        InputError: scipy is missing.
    """
    try:
        from scipy.fft import dctn
    except ImportError as error:
        raise InputError(f"the frequency plot needs scipy, which is not installed; {INSTALL}") from error
    total = np.zeros(grid)
    for row_NC in features_nNC:
        spectrum_HWC = np.asarray(dctn(row_NC.astype(np.float64).reshape(*grid, -1), axes=(0, 1), norm="ortho"))
        total += np.abs(spectrum_HWC).mean(axis=-1)
    return total / len(features_nNC)


@dataclass(frozen=True)
class ChannelProfile:
    """Location and spread of every channel over all rows and tokens, each [C].

    Attributes:
        mean: Mean.
        std: Standard deviation.
        largest: Largest magnitude.
    """

    mean: np.ndarray
    std: np.ndarray
    largest: np.ndarray

    @property
    def rms(self) -> np.ndarray:
        """Root mean square."""
        return np.sqrt(self.mean**2 + self.std**2)

    @property
    def outliers(self) -> np.ndarray:
        """Channels whose largest magnitude is more than six times the median channel's, the largest first."""
        heavy = np.flatnonzero(self.largest > 6 * np.median(self.largest))
        return heavy[np.argsort(-self.largest[heavy], kind="stable")]


def channel_profile(features_nNC: np.ndarray) -> ChannelProfile:
    """Statistics per channel."""
    tokens = features_nNC.reshape(-1, features_nNC.shape[-1]).astype(np.float64)
    return ChannelProfile(tokens.mean(axis=0), tokens.std(axis=0), np.abs(tokens).max(axis=0))


@dataclass(frozen=True)
class ColourMap:
    """The three main directions of features as red, green and blue; a colour means the same in every map.

    Channels are standardised first, so that no heavy one is all there is to see.

    Attributes:
        mean: Of each channel [C].
        spread: Standard deviation of each channel [C].
        directions: [C, 3], or fewer where there are fewer channels.
        low: Value drawn as 0, per direction: the 1st percentile.
        high: Value drawn as 1, per direction: the 99th percentile.
    """

    mean: np.ndarray
    spread: np.ndarray
    directions: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(cls, features_nNC: np.ndarray) -> "ColourMap":
        """Directions and ranges of some features."""
        profile = channel_profile(features_nNC)
        spread = np.where(profile.std > 0, profile.std, 1)
        fitted = ((features_nNC - profile.mean) / spread).reshape(-1, features_nNC.shape[-1])
        _, vectors = np.linalg.eigh(fitted.T @ fitted)
        directions = vectors[:, ::-1][:, :3]
        directions = directions * np.where(directions.sum(axis=0) < 0, -1, 1)  # a direction's sign is arbitrary
        low, high = np.percentile(fitted @ directions, (1, 99), axis=0)
        return cls(profile.mean, spread, directions, low, high)

    def paint(self, features_nNC: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Colours of feature maps: [n, H, W, 3], 0..1."""
        placed = (features_nNC - self.mean) / self.spread @ self.directions - self.low
        colours = placed / np.where(self.high > self.low, self.high - self.low, 1)
        padded = np.zeros((*colours.shape[:-1], 3))  # fewer than three channels leave colours out
        padded[..., : colours.shape[-1]] = np.clip(colours, 0, 1)
        return padded.reshape(len(features_nNC), *grid, 3)


def principal_colours(features_nNC: np.ndarray, grid: tuple[int, int], fit_nNC: np.ndarray) -> np.ndarray:
    """Feature maps in the colours of fit_nNC's main directions: [n, H, W, 3], 0..1; see ColourMap."""
    return ColourMap.fit(fit_nNC).paint(features_nNC, grid)


def replay_views(store: "Store", tars: "Sequence[SampleSource]", rows: Rows) -> np.ndarray:
    """Pixels of the rows' views, uint8 [n, H, W, 3], each compared with the CRC of what the teacher saw.

    Args:
        store: The store.
        tars: Its tars, in any order; those of the rows are enough.
        rows: Readable rows.

    Raises:
        InputError: A tar is missing.
        MismatchError: A tar or a view's pixels are not those of the store.
    """
    from feature_store.inputs.unit_tars import find_tar

    return np.stack([replay_row(store, find_tar(store, row.unit, tars), row) for row in row_ids(row_array(rows))])


def replay_row(store: "Store", tar: "SampleSource", row: RowId) -> np.ndarray:
    """Pixels of one row's view, made from its unit's tar; see replay_views."""
    params = store.view_params(row.unit, row.view)[row.position]
    if params is None:
        raise InputError(f"{row} is quarantined: it has no view; choose another row")
    sample = tar.read(row.position)
    manifest = store.manifest
    pixels = replay_view(decode_image(sample.image), params, manifest.policy.size, manifest.view_encoding)
    software = store.committed.record(row.unit, row.view).software
    crc = int(store.pixel_crcs(row.unit, row.view)[row.position])
    check_pixels(pixels, crc, sample.key, row.view, software.get("pillow"))
    return pixels
