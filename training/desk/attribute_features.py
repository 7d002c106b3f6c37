"""
The judge that never saw a label, as an extractor of features: a CNN that knows how textures are made.

    python training/evaluate_dod.py outputs/desk-samples --reference textures:20000:101 --resolution 32 \
        --extractor training/desk/attribute_features.py:extractor --metrics fid kid
"""

from texture_classifier import JudgeFeatures


extractor = JudgeFeatures("texture-attributes")
