# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Page for the browser that samples a pipeline: classes, variations, priors in between, grids of guidance scales.

    python -m diffusers_dod.demo --checkpoint checkpoints/dod-desk --port 7860

It needs `pip install "diffusers-dod[demo]"`. docs/demo.md shows it.
"""

from .app import main


__all__ = ["main"]
