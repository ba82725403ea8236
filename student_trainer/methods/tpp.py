"""TPP, teacher parameter perception: the teacher's later blocks.

Shape legend: B batch, N tokens at the split, M tokens of the final map, P prefix tokens, D channels.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from feature_store.teacher import LaterBlocks


class TeacherParameterPerception(nn.Module):
    """y = P(CAP3(F3)) for every view path, P being the teacher's later blocks.

    Gradients flow through P. It is used, not owned: it follows the module to its device and dtype, but is in
    neither ``parameters()`` nor ``state_dict()``, so that no optimizer sees it and no checkpoint repeats it.
    """

    def __init__(self, later_blocks: LaterBlocks, *, checkpoint: bool = False) -> None:
        """Borrow the later blocks.

        Args:
            later_blocks: P.
            checkpoint: Run them again for the backward pass instead of keeping their activations.
        """
        super().__init__()
        self._borrowed = (later_blocks,)  # a tuple hides it from nn.Module's registry
        self._checkpoint = checkpoint

    @property
    def later_blocks(self) -> LaterBlocks:
        """P."""
        return self._borrowed[0]

    def forward(self, projected: Mapping[str, Tensor], prefix_BPD: Tensor | None = None) -> dict[str, Tensor]:
        """Final feature maps of projected stage-3 features; all view paths in one pass.

        Args:
            projected: CAP3 outputs [B, N, D] by view path, all of one shape.
            prefix_BPD: The teacher's own prefix tokens at the split, if it has any.

        Returns:
            Tokens [B, M, D] by view path.

        Raises:
            InputError: The tokens do not fit the later blocks, or prefix tokens are missing.
        """
        paths = len(projected)
        prefix = None if prefix_BPD is None else prefix_BPD.repeat(paths, 1, 1)
        perceived = self._perceive(torch.cat(list(projected.values())), prefix)
        return dict(zip(projected, perceived.chunk(paths), strict=True))

    def _perceive(self, x_BND: Tensor, prefix_BPD: Tensor | None) -> Tensor:
        if not self._checkpoint:
            return self.later_blocks(x_BND, prefix_BPD)
        # the blocks draw no random numbers, so there is no state to keep for the second run
        return checkpoint(self.later_blocks, x_BND, prefix_BPD, use_reentrant=False, preserve_rng_state=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TeacherParameterPerception":
        """Where ``.to()``, ``.cuda()`` and ``.double()`` end up."""
        self.later_blocks._apply(fn, recurse)
        return super()._apply(fn, recurse)
