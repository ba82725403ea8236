"""Progress of a run on stderr."""

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from feature_store.tools.terminal import Console, ProgressBar


class RunProgress:
    """Shows where a run is; does nothing when switched off."""

    def __init__(self, *, enabled: bool, total: int, done: int = 0, console: Console | None = None) -> None:
        """Set up the bar.

        Args:
            enabled: Show anything at all.
            total: Steps of the whole run.
            done: Steps already done.
            console: Where to; default stderr.
        """
        self._enabled, self._console = enabled, console or Console(stderr=True)
        self._bar = ProgressBar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task = self._bar.add_task("starting", total=total, completed=done)

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, epoch: int, epochs: int, loss: float | None) -> None:
        """One optimizer step more; the loss is None where it was not read."""
        self._bar.advance(self._task)
        if loss is not None:
            self._bar.update(self._task, description=f"epoch {epoch + 1}/{epochs} loss {loss:.4f}")

    def note(self, line: str) -> None:
        """A line that stays."""
        if self._enabled:
            self._bar.console.print(line, soft_wrap=True)
