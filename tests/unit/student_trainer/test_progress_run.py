import io

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
