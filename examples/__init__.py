"""Examples: exported students as backbones for detection, segmentation; see docs/downstream.md."""
