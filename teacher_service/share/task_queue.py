"""A queue of tasks that loses none: a task is queued, in a worker's hands, or committed."""

from collections import deque
from collections.abc import Iterable

from teacher_service.cache.decode import Task
from teacher_service.cache.pipeline import UnitDone


class TaskQueue:
    """Hands tasks out to workers that come and go; used by one thread at a time.

    Args:
        tasks: What there is to do, in order.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._queued = deque(tasks)
        self._held: dict[str, dict[Task, None]] = {}
        self._news: list[tuple[str, UnitDone]] = []

    def next(self, worker: str) -> Task | None:
        """A task for a worker; None if there is none now."""
        if not self._queued:
            return None
        task = self._queued.popleft()
        self._held.setdefault(worker, {})[task] = None
        return task

    def committed(self, worker: str, done: UnitDone) -> None:
        """A worker committed a task."""
        self._held.get(worker, {}).pop(done.task, None)
        self._news.append((worker, done))

    def dismiss(self, worker: str) -> list[Task]:
        """A worker has ended or died; what it still held."""
        return list(self._held.pop(worker, {}))

    def queue(self, tasks: Iterable[Task]) -> None:
        """Queue tasks that were handed out in vain, ahead of the rest."""
        self._queued.extendleft(reversed(list(tasks)))

    def close(self) -> None:
        """Hand out no more."""
        self._queued.clear()

    def news(self) -> list[tuple[str, UnitDone]]:
        """Commits since the last call, each with its worker."""
        news, self._news = self._news, []
        return news

    def counts(self) -> tuple[int, int]:
        """Tasks queued, and tasks in workers' hands."""
        return len(self._queued), sum(map(len, self._held.values()))
