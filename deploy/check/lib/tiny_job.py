"""Makes two small image tars, a teacher's weights: ``python tiny_job.py FOLDER``; needs the extra ``teacher``.

The teacher is timm's test_vit with random weights; jobs name it with the options in FOLDER/teacher.options.
"""

import io
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from webdataset.writer import TarWriter


def picture(seed: int) -> bytes:
    """A PNG of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def main(folder: Path) -> None:
    """Write the tars and the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for unit in range(2):
        with TarWriter(str(folder / f"images-{unit}.tar"), encoder=False) as tar:
            for i in range(8):
                tar.write({"__key__": f"u{unit}-{i}", "png": picture(8 * unit + i), "cls": str(i % 4).encode()})
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, depth=4, num_classes=4)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "teacher.safetensors")
    options = '--teacher test_vit --model-kwargs {"img_size":32,"depth":4,"num_classes":4} --device cpu'
    (folder / "teacher.options").write_text(options)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
