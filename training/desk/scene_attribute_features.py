"""
The judge of scenes that never saw a label, as an extractor of features:

    python training/evaluate_dod.py outputs/scene-samples --reference scenes:20000:101 --resolution 64 \
        --extractor training/desk/scene_attribute_features.py:extractor --metrics fid kid
"""

from texture_classifier import JudgeFeatures


extractor = JudgeFeatures("scene-attributes")
