"""The later blocks' weights as a bundle."""

from collections.abc import Mapping

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from feature_store.errors import CorruptStoreError, MismatchError
from feature_store.format.manifest import Manifest
from feature_store.teacher.model import build_model, weights_sha256
from feature_store.teacher.split import LaterBlocks, no_later_blocks, split_teacher


def bundle_state(later_blocks: LaterBlocks | None) -> dict[str, Tensor]:
    """Every tensor the later blocks need, by name: parameters and all buffers, also those a state dict leaves out.

    Empty for a teacher without later blocks.
    """
    return {name: tensor.detach().cpu() for name, tensor in bundle_tensors(later_blocks).items()}


def bundle_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of a bundle, as the manifest keeps it."""
    return weights_sha256(state)


def build_later_blocks(
    manifest: Manifest, arrays: Mapping[str, ArrayLike], device: str | torch.device = "cpu"
) -> LaterBlocks:
    """The later blocks of a store's teacher.

    The rest of the teacher exists on the meta device only, for a moment, and never takes memory.

    Args:
        manifest: Names the model and where it is cut.
        arrays: The bundle: values by tensor name.
        device: Where the blocks go.

    Raises:
        InputError: The store's teacher has no later blocks.
        MismatchError: The bundle is not the one the manifest names, or timm now builds other blocks.
        CorruptStoreError: A tensor the blocks need is missing.
    """
    if not manifest.split.has_later_blocks:
        raise no_later_blocks(manifest.teacher.name)
    state = {name: torch.as_tensor(values) for name, values in arrays.items()}
    got = bundle_sha256(state)
    if got != manifest.blocks_sha256:
        raise MismatchError(
            "blocks_sha256",
            expected=manifest.blocks_sha256,
            got=got,
            where="the manifest",
            remedy="these blocks come from another checkpoint; take the store's own teacher/blocks",
        )
    with torch.device("meta"):
        model = build_model(manifest.teacher.name, manifest.teacher.model_kwargs)
        _, later_blocks = split_teacher(model, manifest.split.depth, drop_prefix=manifest.split.drops_prefix)
    if later_blocks.info != manifest.split:
        raise MismatchError(
            "split",
            expected=manifest.split,
            got=later_blocks.info,
            remedy="use the timm version that wrote the store",
        )
    _assign(later_blocks, state)
    return later_blocks.to(device)


def _assign(later_blocks: LaterBlocks, state: Mapping[str, Tensor]) -> None:
    wanted = bundle_tensors(later_blocks)
    if wanted.keys() != state.keys():
        missing, foreign = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
        raise CorruptStoreError(
            f"the bundle does not fit the later blocks: missing {missing}, unknown {foreign}; "
            "use the timm version that wrote the store"
        )
    for name, old in wanted.items():
        if old.shape != state[name].shape:
            raise CorruptStoreError(
                f"{name} has shape {tuple(state[name].shape)} in the bundle, {tuple(old.shape)} in timm's model; "
                "use the timm version that wrote the store"
            )
        owner, _, leaf = name.rpartition(".")
        module = later_blocks.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = torch.nn.Parameter(state[name], requires_grad=False)
        else:
            module._buffers[leaf] = state[name]


def bundle_tensors(later_blocks: LaterBlocks | None) -> dict[str, Tensor]:
    """The tensors of bundle_state, where they are."""
    if later_blocks is None:
        return {}
    return {**dict(later_blocks.named_parameters()), **dict(later_blocks.named_buffers())}
