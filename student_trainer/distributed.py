"""The processes of one run: which one this is, and what they tell each other. Alone, it is a group of one."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from feature_store.errors import InputError, ResourceError, UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # the others wait while the main process validates


@dataclass(frozen=True)
class Group:
    """This process among those of its run.

    Attributes:
        rank: Number of this process; 0 is the main one, which alone writes and validates.
        size: Number of processes.
        local_rank: Number of this process on its machine, and of the GPU it uses; None without torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all processes, the same on each."""
        if self.size == 1:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed / self.size

    def gather(self, item: T) -> list[T]:
        """The item of every process, by rank, on each."""
        if self.size == 1:
            return [item]
        items: list[T | None] = [None] * self.size
        dist.all_gather_object(items, item)
        return cast("list[T]", items)

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, on every process; its user error ends all of them, see together."""
        made = self.together(lambda: make() if self.is_main else None)
        return cast("T", self.gather(made)[0])

    def together(self, build: Callable[[], T]) -> T:
        """What each process builds for itself, or the end of all of them.

        Raises:
            UserError: On the main process: the first user error of any process.
            SystemExit: On the others, with that error's exit code: the main process tells it once.
        """
        built, error = None, None
        try:
            built = build()
        except UserError as caught:
            error = caught
        first = next((found for found in self.gather(error) if found is not None), None)
        if first is not None and not self.is_main:
            raise SystemExit(first.exit_code)
        if first is not None:
            raise first
        return cast("T", built)


def is_main_process() -> bool:
    """Whether this process is the one of its run that prints; also true without torchrun."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group that torchrun started this process in; a group of one without torchrun.

    NCCL connects GPUs, Gloo CPUs.

    Args:
        device: ``--device``; ``cuda`` and ``auto`` give each process of a machine its own GPU.

    Raises:
        InputError: One particular GPU for several processes.
        ResourceError: Fewer GPUs than processes on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    group = Group(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    on_gpu = _uses_gpus(device, group)
    if on_gpu:
        torch.cuda.set_device(group.local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group()


def _uses_gpus(device: str, group: Group) -> bool:
    if device.startswith("cuda:"):
        raise InputError(
            f"--device is {device}, but {group.size} processes were started; use --device cuda, one GPU for each"
        )
    if device == "cpu" or not (torch.cuda.is_available() or device == "cuda"):
        return False
    assert group.local_rank is not None  # torchrun sets it
    if group.local_rank >= torch.cuda.device_count():
        raise ResourceError(
            f"process {group.local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}; start "
            "torchrun with at most as many processes, or use --device cpu"
        )
    return True


def synchronise_batchnorm(module: nn.Module, group: Group, device: torch.device) -> nn.Module:
    """The module with BatchNorm over the samples of all processes; as it is in a group of one.

    Raises:
        InputError: Several processes on CPUs, where torch cannot do this.
    """
    if group.size == 1:
        return module
    if device.type != "cuda":
        raise InputError(
            "--sync-bn with several processes needs GPUs, torch has no CPU version of it; "
            "use one process, or leave it out (presets: --no-sync-bn)"
        )
    return convert_sync_batchnorm(module)


def data_parallel(module: nn.Module, group: Group) -> nn.Module:
    """The module with gradients averaged over all processes; as it is in a group of one."""
    if group.size == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)


def gradients_shared(module: nn.Module, *, now: bool) -> AbstractContextManager[None]:
    """For a forward and backward pass: average its gradients over processes now, or leave that to a later pass."""
    if isinstance(module, nn.parallel.DistributedDataParallel) and not now:
        return module.no_sync()
    return nullcontext()
