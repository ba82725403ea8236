"""LightlyTrain's dense distillation as a contender of peers.py: DINOv2 ViT-S/14, without its weights, to ResNet-18."""

from collections.abc import Callable

from PIL import ImageFile
from torch import Tensor, nn

TEACHER, STUDENT = "vit_small_patch14_dinov2", "resnet18"  # timm names of the same networks


def lightly_distiller(batch: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Its method and a function from normalised images [B, 3, 224, 224] and labels [B], unused, to the loss.

    Args:
        batch: Images per step.

    Raises:
        ImportError: It is not installed.
    """
    from lightly_train._methods.distillationv2 import distillationv2 as v2  # pyright: ignore[reportMissingImports]
    from lightly_train._models import package_helpers  # pyright: ignore[reportMissingImports]
    from lightly_train._models.embedding_model import EmbeddingModel  # pyright: ignore[reportMissingImports]

    ImageFile.LOAD_TRUNCATED_IMAGES = False  # its import lets truncated images pass, which this project refuses
    teacher, student = (
        package_helpers.get_wrapped_model(name, num_input_channels=3, load_weights=False)
        for name in ("dinov2/vits14-noreg", "torchvision/resnet18")
    )
    method = v2.DistillationV2(
        v2.DistillationV2Args.model_construct(teacher=teacher),  # a network where its checked options want a name
        v2.DistillationV2LARSArgs(),
        EmbeddingModel(student),
        global_batch_size=batch,
        num_input_channels=3,
    )
    method.train()
    method.teacher_embedding_model.eval()
    return method, lambda images, _: method.training_step_impl({"views": [images]}, 0).loss
