"""The processes of one run."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from feature_store.errors import InputError, ResourceError, UserError, one_line

T = TypeVar("T")

_RELEASE_SECONDS = 0.2
_TIMEOUT = timedelta(hours=2)  # the others wait while the main process validates
JOIN = timedelta(minutes=2)  # processes of one run start within seconds of each other
_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class OtherProcessError(UserError):
    """The run ended because of an error that the main process reports.

    Attributes:
        exit_code: That error's.
    """

    def __init__(self, cause: UserError) -> None:
        super().__init__(f"another process of the run failed: {cause}")
        self.exit_code = cause.exit_code


@dataclass(frozen=True)
class Group:
    """This process among those of its run.

    Attributes:
        rank: Number of this process; 0 is the main one, which alone writes.
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

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Result on all processes of a function that the main one runs; its user error ends all, see all_or_raise."""
        made = self.all_or_raise(lambda: make() if self.is_main else None)
        return cast("T", self.gather(made)[0])

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the main one's buffers: each has BatchNorm statistics of its own samples."""
        if self.size == 1:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                values = buffer.contiguous()
                dist.broadcast(values, src=0)
                buffer.copy_(values)

    def any(self, *flags: bool, device: torch.device) -> tuple[bool, ...]:
        """For each flag, whether any process sets it; several processes wait for their devices."""
        if self.size == 1:
            return flags
        return tuple(mean > 0 for mean in self.mean(torch.tensor(flags, dtype=torch.float32, device=device)).tolist())

    def all_or_raise(self, build: Callable[[], T]) -> T:
        """Run a function in each process, and end all if it fails in one.

        Raises:
            UserError: On the main process: the first user error of any process.
            OtherProcessError: On the others; the main process reports the cause.
        """
        built, error = None, None
        try:
            built = build()
        except UserError as caught:
            error = caught
        first = next((found for found in self.gather(error) if found is not None), None)
        if first is not None:
            raise first if self.is_main else OtherProcessError(first)
        return cast("T", built)


ALONE = Group()


def is_main_process() -> bool:
    """Whether this process is the one of its run that prints; also true without torchrun."""
    return started_group().is_main


def started_group() -> Group:
    """The group that torchrun's environment variables say this process was started in; a group of one without them.

    Raises:
        InputError: Some of them are missing, or are no numbers that fit together.
    """
    given = {name: value for name in _VARIABLES if (value := os.environ.get(name, "").strip())}
    size = _number(given, "WORLD_SIZE", 1) if "WORLD_SIZE" in given else 1
    if size == 1:
        return Group()
    if missing := [name for name in _VARIABLES if name not in given]:
        raise InputError(
            f"the environment variable WORLD_SIZE is {size}, so this would be one of {size} processes, but these are "
            f"not set: {', '.join(missing)}; start the run with torchrun, or unset WORLD_SIZE to train in one process"
        )
    _number(given, "MASTER_PORT", 1, 65535)
    return Group(_number(given, "RANK", 0, size - 1), size, _number(given, "LOCAL_RANK", 0, size - 1))


def _number(given: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    value = given[name]
    if not value.isdecimal() or int(value) < least or (most is not None and int(value) > most):
        expected = f"a whole number from {least}" + ("" if most is None else f" to {most}")
        raise InputError(
            f"the environment variable {name} is {value!r}, expected {expected}; start the run with torchrun, or unset "
            "WORLD_SIZE to train in one process"
        )
    return int(value)


@contextmanager
def joined(device: str, patience: timedelta = JOIN) -> Iterator[Group]:
    """The group that torchrun started this process in; a group of one without torchrun.

    NCCL connects GPUs, Gloo CPUs.

    Args:
        device: ``--device``; ``cuda`` and ``auto`` give each process of a machine its own GPU.
        patience: Time to wait for the others.

    Raises:
        InputError: One particular GPU for several processes, or torchrun's environment variables in part.
        ResourceError: Fewer GPUs than processes on this machine, or the other processes cannot be reached.
    """
    group = started_group()
    if group.size == 1:
        yield group
        return
    on_gpu = _uses_gpus(device, group)
    if on_gpu:
        torch.cuda.set_device(group.local_rank)
    _connect(group, "nccl" if on_gpu else "gloo", patience)
    try:
        yield group
    finally:
        # Gloo's destructor joins threads while it holds the interpreter's lock (torch 2.6): those that still release
        # Python objects of the last collective need the lock first, or both wait for ever.
        time.sleep(_RELEASE_SECONDS)
        dist.destroy_process_group()


def _connect(group: Group, backend: str, patience: timedelta) -> None:
    """Meet the other processes where MASTER_ADDR and MASTER_PORT say."""
    try:
        store, _, _ = next(dist.rendezvous("env://", group.rank, group.size, timeout=patience))  # pyright: ignore[reportPrivateImportUsage]
        store.set_timeout(_TIMEOUT)
        store = dist.PrefixStore("default_pg", store)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.size, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:  # of torch.distributed's own kinds, all of them RuntimeErrors
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ResourceError(
            f"process {group.rank} of {group.size} (WORLD_SIZE) did not meet the others at {at} (MASTER_ADDR, "
            f"MASTER_PORT) within {patience.total_seconds():.0f} seconds: {one_line(error)}; start all of them, "
            "check the address, or unset WORLD_SIZE to train in one process"
        ) from error


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


def synchronise_batchnorm(student: nn.Module, group: Group, device: torch.device) -> nn.Module:
    """The student with BatchNorm over the samples of all processes; as it is in a group of one.

    Raises:
        InputError: Several processes on CPUs, where torch cannot do this.
    """
    if group.size == 1:
        return student
    if device.type != "cuda":
        raise InputError(
            "--sync-bn with several processes needs GPUs, torch has no CPU version of it; "
            "use one process, or leave it out (presets: --no-sync-bn)"
        )
    return convert_sync_batchnorm(student)


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
