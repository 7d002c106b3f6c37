# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
`ImageFeatures` under the name by which the published extractor imports it: published results hold the hash of that
file, training/desk/texture_features.py. Other code imports it from `diffusers_dod.metrics.extractors`.
"""

from ..metrics.extractors import ImageFeatures as PictureFeatures


__all__ = ["PictureFeatures"]
