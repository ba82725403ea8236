"""Draws and applies many views and reports their CRCs; run in other processes by test_views."""

import json
import sys

import numpy as np
from PIL import Image

from feature_store.views import apply_view, draw_view, pixel_crc, view_policy

TASKS = [(name, f"n{i:04}", view) for name in ("rrc_flip", "a1", "a2") for i in range(8) for view in range(3)]


def source(width=61, height=47):
    """A fixed image with structure at several scales, made of integers only."""
    y, x, channel = np.indices((height, width, 3))
    return Image.fromarray(((x * 5 + y * 3 * (channel + 1) + (x * y) % (7 + channel) * 9) % 256).astype(np.uint8))


def digest(task):
    name, key, view = task
    image = source()
    policy = view_policy(name, (24, 32), erase=0.5, op_probability=0.9)
    params = draw_view(policy, 11, key, view, image.size)
    return pixel_crc(apply_view(image, params, policy.size))


if __name__ == "__main__":
    json.dump([digest(task) for task in TASKS], sys.stdout)
