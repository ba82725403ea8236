"""Every Python example of docs/how-to/client.md runs, in order, against a running service."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from service_process import running_service
from training_world import shared_world

DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "client.md"


@pytest.fixture(scope="module")
def url():
    world = shared_world("vit")
    name, _ = world.teacher
    with running_service(
        world.store, "--teacher", name, "--checkpoint", str(world.checkpoint), "--device", "cpu"
    ) as running:
        yield running.url


def test_examples_run_when_pasted_in_order(url):
    examples = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(examples) == 4
    found: dict = {}
    for example in examples:
        exec(example.replace("http://127.0.0.1:8000", url), found)
    assert found["features"]["stage4"].shape == (2, 16, 64)
    assert torch.equal(found["tensors"]["logits"], torch.from_numpy(found["features"]["logits"]))
    assert found["features"]["rows"].tolist() == [[0, 0, 1], [1, 4, 1]]
    assert found["batch"].rows[-1].tolist() == [0, 13, 0]
    np.testing.assert_array_equal(found["codes"][""][0], found["source"].read([(0, 0, 0)]).taps["stage4"][0])
