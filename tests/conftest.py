"""What the tests share."""

import datasets
import pytest
import torch
from helpers import tiny_pipeline

from diffusers_dod import DoDPipeline


@pytest.fixture
def pipe() -> DoDPipeline:
    return tiny_pipeline()


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """`datasets` keeps what it has read of a folder; each module has a place of its own for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
