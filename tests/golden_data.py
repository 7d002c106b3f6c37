"""The golden tensors and the models they belong to."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusers_dod import DoDTransformer2DModel
from diffusers_dod.conversion import fitv2_to_dod


FOLDER = Path(__file__).parent / "golden"
SHAPES = ("sq8x8", "ns8x12", "ns12x8")
CONFIG = {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "adaln_lora_dim": 16,
    "num_classes": 10,
}


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def golden_model(prior_embed_dim: int | None = None) -> DoDTransformer2DModel:
    model = DoDTransformer2DModel(**CONFIG, prior_embed_dim=prior_embed_dim)
    model.load_state_dict(fitv2_to_dod(golden("fitv2_tiny"), prior_embed_dim))
    return model.eval()


def timestep_of(fit_time: torch.Tensor) -> torch.Tensor:
    """FiT's time, 1 = data, as our timestep."""
    return 1000 * (1 - fit_time)
