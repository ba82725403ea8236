"""Examples: exported students as backbones for detection, segmentation; see docs/how-to/downstream.md."""
