"""What the tests share."""

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
