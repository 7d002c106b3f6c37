"""
The texture classifier as an extractor of features, for samples of the desk-size checkpoint:

    python training/evaluate_dod.py outputs/desk-samples --reference textures:20000:101 \
        --extractor training/desk/texture_features.py:extractor --metrics fid is precision_recall
"""

from pathlib import Path

import torch
from texture_classifier import TextureClassifier

from diffusers_dod.evaluation.extractors import PictureFeatures


CLASSIFIER = Path(__file__).parents[2] / "checkpoints" / "texture-classifier"


class TextureFeatures(torch.nn.Module):
    """Pictures (B, 3, 32, 32) in uint8 -> 64 features and the logits of 12 classes."""

    def __init__(self):
        super().__init__()
        self.classifier = TextureClassifier.load(CLASSIFIER)

    def forward(self, pictures: torch.Tensor) -> PictureFeatures:
        features, logits, _ = self.classifier(pictures.float() / 127.5 - 1)
        return PictureFeatures(features, logits=logits)


extractor = TextureFeatures()
