"""Failures of machine or numbers, as errors with a remedy."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from feature_store.errors import ResourceError, UserError, one_line
from feature_store.format.addressing import RowId
from student_trainer.data.loader import worker_failures_told
from student_trainer.engine.distributed import Group, OtherProcessError
from student_trainer.engine.stopping import Stop

_REMEDY = "lower --optim.lr, set --optim.clip-grad, or use --amp off"


@contextmanager
def machine_failures_told(stop: Stop) -> Iterator[None]:
    """Convert out-of-memory errors, and the end of another process, to ResourceErrors within the context."""
    try:
        with worker_failures_told():
            yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the GPU's memory is full: {one_line(error)}; start a run with a larger --accumulate, --amp bfloat16 or "
            "--scalekd.checkpoint-later-blocks"
        ) from error
    except RuntimeError as error:
        if "gloo/transport" not in str(error):  # a connection that was closed, reset or broken
            raise
        stop.check()  # the others got the signal too
        raise ResourceError("another process of the run ended; its own message says why") from error


def not_finite_loss(
    step: int, epoch: int, terms: Mapping[str, float], rows: Sequence[RowId], group: Group
) -> UserError:
    """The error of a loss that is not finite; every process calls this.

    Args:
        step: Number of the first such step of any process.
        epoch: Its epoch.
        terms: This process's terms where it was read.
        rows: First rows of this process's batch.
        group: The run's processes; the rows named are those of the first process whose loss is not finite.
    """
    everyone = group.gather((dict(terms), list(rows[:4])))
    values, first_rows = next(
        ((found, r) for found, r in everyone if not all(map(math.isfinite, found.values()))), everyone[0]
    )
    shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
    where = ", ".join(f"unit {row.unit} position {row.position} view {row.view}" for row in first_rows)
    error = UserError(
        f"the loss is not finite at step {step} (epoch {epoch}): {shown}; first rows of the batch: {where}; {_REMEDY}"
    )
    return error if group.is_main else OtherProcessError(error)


def require_finite_weights(module: nn.Module, step: int, group: Group) -> None:
    """Refuse to replace a checkpoint by weights that are not finite.

    Raises:
        UserError: Some are NaN or infinite.
    """
    if all(weights.isfinite().all() for weights in module.parameters()):
        return
    error = UserError(
        f"weights are not finite after step {step}: not saved, the checkpoint before this one stays; {_REMEDY}, in a "
        "new run"
    )
    raise error if group.is_main else OtherProcessError(error)  # whose weights are the same
