"""Command line of the downstream recipes: detection, segmentation."""

from collections.abc import Sequence
from typing import Annotated

import tyro

from feature_store.tools.command_line import run
from feature_store.tools.terminal import say_json
from student_trainer.downstream.detection import DetectionConfig, train_detector
from student_trainer.downstream.segmentation import SegmentationConfig, train_segmenter

app = tyro.extras.SubcommandApp()


@app.command
def detection(config: Annotated[DetectionConfig, tyro.conf.arg(name="")]) -> None:
    """Fine-tune Mask R-CNN on COCO-format data; prints box and mask AP as JSON if there is validation data.

    Args:
        config: The run.
    """
    say_json(train_detector(config), indent=2)


@app.command
def segmentation(config: Annotated[SegmentationConfig, tyro.conf.arg(name="")]) -> None:
    """Fine-tune an UperNet on ADE20K-format data; prints mIoU as JSON if there is validation data.

    Args:
        config: The run.
    """
    say_json(train_segmenter(config), indent=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(app, "student_trainer.downstream", argv, extra="student")
