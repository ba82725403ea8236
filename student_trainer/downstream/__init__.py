"""Exported students as backbones: recipes for detection on COCO and segmentation on ADE20K, one GPU each.

Small on purpose: they show how the weights are loaded and give a fair fine-tuning run; see docs/downstream.md.
"""
