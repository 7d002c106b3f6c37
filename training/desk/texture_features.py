"""
The texture classifier as an extractor of features, for samples of the desk-size checkpoint:

    python training/evaluate_dod.py outputs/desk-samples --reference textures:20000:101 \
        --extractor training/desk/texture_features.py:extractor --metrics fid is precision_recall
"""

from texture_classifier import JudgeFeatures


extractor = JudgeFeatures("texture-classifier")
