import io
import re

import pytest

from feature_store.tools.terminal import Console
from student_trainer.engine.progress import RunProgress


@pytest.mark.parametrize(("enabled", "terminal"), [(True, True), (True, False), (False, True)])
def test_progress_shows_a_bar_on_terminals_and_lines_elsewhere_when_enabled(enabled, terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with RunProgress(enabled=enabled, total=10, done=4, console=console) as progress:
        progress.step(epoch=1, epochs=3, loss=0.5)
        progress.note("epoch 2/3: [top-1] 50 %")
    shown = out.getvalue()
    assert ("5/10" in shown) == ("epoch 2/3 loss 0.5000" in shown) == (enabled and terminal)
    assert ("epoch 2/3: [top-1] 50 %" in shown) == enabled


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (0.25, r"^epoch 2/3 loss 0\.2500 \S+ +5/10 0:00:00 left [-0-9:]+$"),
        (None, r"^starting \S+ +5/10 0:00:00 left [-0-9:]+$"),
    ],
)
def test_bar_says_epoch_loss_steps_and_time_left_and_keeps_its_words_when_no_loss_was_read(loss, shown):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with RunProgress(enabled=True, total=10, done=4, console=console) as progress:
        progress.step(epoch=1, epochs=3, loss=loss)
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert any(re.search(shown, line) for line in re.split(r"[\r\n]", printed)), printed
