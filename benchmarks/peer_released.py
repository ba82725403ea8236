"""ScaleKD's released code as a contender of peers.py: Swin-T to ResNet-18, with all parts of the method."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

TEACHER, STUDENT = "swin_tiny_patch4_window7_224", "resnet18"  # timm names of its networks
STUDENT_DIMS, TEACHER_DIMS = (256, 512), (384, 768)  # of stages 3 and 4
HEADS, GRIDS = (3, 6), ((14, 14), (7, 7))  # of swin-s_distill_res50_img_s3_s4.py, whose teacher has the same widths


def released_distiller(checkout: Path) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Its distiller and a function from normalised images [B, 3, 224, 224] and labels [B] to the loss.

    Raises:
        ImportError: Something that it needs is not installed.
    """
    sys.path.insert(0, str(checkout))
    from mmcls.models import build_classifier  # pyright: ignore[reportMissingImports]
    from mmcls.structures import ClsDataSample  # pyright: ignore[reportMissingImports]
    from mmcls.utils import register_all_modules  # pyright: ignore[reportMissingImports]
    from mmengine.config import ConfigDict  # pyright: ignore[reportMissingImports]

    register_all_modules()
    configs = checkout.absolute() / "configs"
    with tempfile.TemporaryDirectory() as folder:
        student = Path(folder) / "student.py"  # with the four maps that the distiller reads
        base = configs / "resnet/resnet18_8xb32_in1k.py"
        student.write_text(f"_base_ = {str(base)!r}\nmodel = dict(backbone=dict(out_indices=(0, 1, 2, 3)))\n")
        distiller = build_classifier(
            ConfigDict(
                type="ClassificationDistiller",
                use_logit=True,
                teacher_cfg=str(configs / "swin_transformer/swin-tiny_16xb64_in1k.py"),
                student_cfg=str(student),
                distill_cfg=[
                    {"methods": [_mimicking(0, "loss_fmd_s3", self_query=True)]},
                    {"methods": [_mimicking(1, "loss_fmd_s4", self_query=False)]},
                    {"methods": [{"type": "KDLoss", "name": "loss_kd", "use_this": True, "temp": 1.0, "alpha": 0.5}]},
                ],
            )
        )
    distiller.train()
    distiller.teacher.eval()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        samples = [ClsDataSample().set_gt_label(label) for label in labels]
        total, _ = distiller.parse_losses(distiller.loss(images, samples))
        return total

    return distiller, loss


def _mimicking(stage: int, name: str, *, self_query: bool) -> dict[str, Any]:
    return {
        "type": "FreqMaskingDistillLossv2",
        "name": name,
        "use_this": True,
        "alpha": [0.08, 0.06],
        "student_dims": STUDENT_DIMS[stage],
        "teacher_dims": TEACHER_DIMS[stage],
        "query_hw": GRIDS[stage],
        "pos_hw": GRIDS[stage],
        "pos_dims": TEACHER_DIMS[stage],
        "self_query": self_query,
        "softmax_scale": [5.0, 5.0],
        "num_heads": HEADS[stage],
        "dis_freq": "high",
    }
