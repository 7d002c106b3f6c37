"""The golden tensors and the models they belong to."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusers_dod import DoDFlowMatchScheduler, DoDTransformer2DModel
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


# Data N(mu_c, s_c^2) per channel, for which the flow is known in closed form, and the end points of SiT's own solvers.
GAUSSIAN = golden("ode_gaussian")


def gaussian_velocity(sample: torch.Tensor, timestep: torch.Tensor, indices=None) -> torch.Tensor:
    mean, std = GAUSSIAN["mu"].double(), GAUSSIAN["s"].double()
    sigma = timestep.double().reshape(-1, 1, 1, 1) / 1000
    data, variance = 1 - sigma, ((1 - sigma) * std) ** 2 + sigma**2
    velocity = -(mean + (data * std**2 - sigma) / variance * (sample.double() - data * mean))
    return velocity.to(sample.dtype)


def solve_gaussian(solver: str, num_inference_steps: int | None = None, **config):
    scheduler = DoDFlowMatchScheduler(solver=solver, **config)
    if num_inference_steps is not None:
        scheduler.set_timesteps(num_inference_steps)
    return scheduler.solve(gaussian_velocity, GAUSSIAN["noise"])


def gaussian_error(sample: torch.Tensor) -> float:
    return (sample - GAUSSIAN["exact"]).abs().max().item()
