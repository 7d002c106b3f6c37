"""
The judge that never saw a label, as an extractor of features: a CNN that knows how textures are made.

    python training/evaluate_dod.py outputs/desk-samples --reference textures:20000:101 --resolution 32 \
        --extractor training/desk/attribute_features.py:extractor --metrics fid kid
"""

from pathlib import Path

import torch
from texture_classifier import TextureClassifier


JUDGE = Path(__file__).parents[2] / "checkpoints" / "texture-attributes"


class AttributeFeatures(torch.nn.Module):
    """Images (B, 3, 32, 32) in uint8 -> 64 features."""

    def __init__(self):
        super().__init__()
        self.judge = TextureClassifier.load(JUDGE)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features, _, _ = self.judge(images.float() / 127.5 - 1)
        return features


extractor = AttributeFeatures()
