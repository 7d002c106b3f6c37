"""
The classifier of scenes as an extractor of features, for samples of a checkpoint of scenes:

    python training/evaluate_dod.py outputs/scene-samples --reference scenes:20000:101 --resolution 64 \
        --extractor training/desk/scene_features.py:extractor --metrics fid is precision_recall
"""

from texture_classifier import JudgeFeatures


extractor = JudgeFeatures("scene-classifier")
