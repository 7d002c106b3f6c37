# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
A small generator of latent tokens, which takes the place of stage 1: noise and a class -> the tokens of an image.

It is a rectified flow (paper, Eqs. 1-3) over the tokens, standardised by their mean and deviation, with an MLP whose
input and output are scaled as in EDM (Karras et al. 2022, arXiv:2206.00364, Table 1), here for velocities:

    q = sigma^2 + (1 - sigma)^2
    velocity = (2 sigma - 1) / q * x_sigma + MLP(x_sigma / sqrt(q), sigma, class) / sqrt(q)

The first term is the velocity of standard normal tokens. So an MLP of zero, which a new model has, draws normal tokens
with the mean and the deviations of those of images, and its target has unit size at all times.
"""

import inspect

import torch
import torch.nn as nn
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm

from .checks import MAX_CLASSES, MAX_SIZE, MAX_STEPS, check_at_least, check_label_ids, check_number, check_tensor
from .guidance import classifier_free_guidance
from .modeling_utils import DoDModelMixin
from .rectified_flow import NUM_TRAIN_TIMESTEPS, euler_step
from .transformer_dod import MAX_LAYERS, DoDTimestepEmbedding


def count_classes(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """
    Counts the images of each class, of which there must be some of every class.

    Args:
        labels (`torch.Tensor` of shape `(n,)`): Class ids.
        num_classes (`int`): Number of classes.

    Returns:
        `torch.Tensor` of shape `(num_classes,)`: The numbers of images.

    Raises:
        `ValueError`, `TypeError`: the labels have another type or shape or are out of range, or a class has none.
    """
    check_label_ids("labels", labels, num_classes - 1)
    counts = torch.bincount(labels, minlength=num_classes)
    if missing := (counts == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"`labels` must hold all {num_classes} classes, got none of {missing[:5]}.")
    return counts


class TokenPriorBlock(nn.Module):
    """
    A residual block: a two-layer MLP on normalised features, with a shift, a scale and a gate (AdaLN).

    Args:
        dim (`int`): Width of the features.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = FP32LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, inner_dim=dim, activation_fn="gelu")
        self.scale_shift_table = nn.Parameter(torch.zeros(3, dim))

    def forward(self, hidden_states: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """Maps `hidden_states` (B, dim) to the same shape, with the `modulation` (B, 3, dim) of all blocks."""
        shift, scale, gate = (modulation + self.scale_shift_table).unbind(1)
        return hidden_states + gate * self.ff(self.norm(hidden_states) * (1 + scale) + shift)


class TokenPrior(DoDModelMixin):
    r"""
    A generator of the latent tokens of images of a class, in place of stage 1.

    Args:
        num_latent_tokens (`int`, defaults to 32): Number N of latent tokens, the latent embedder's.
        latent_token_dim (`int`, defaults to 16): Width d_e of a latent token.
        num_classes (`int`, defaults to 1000): Number of classes, the transformer's. It is the id of the null class.
        hidden_dim (`int`, defaults to 256): Width of the MLP.
        num_layers (`int`, defaults to 3): Number of its residual blocks.

    Raises:
        `ValueError`, `TypeError`: an argument is out of range or of the wrong type.
    """

    _no_split_modules = ["TokenPriorBlock"]
    _repeated_blocks = ["TokenPriorBlock"]
    _skip_layerwise_casting_patterns = ["token_embedder", "proj_out", "token_mean", "token_std", "class_means"]

    @register_to_config
    def __init__(
        self,
        num_latent_tokens: int = 32,
        latent_token_dim: int = 16,
        num_classes: int = 1000,
        hidden_dim: int = 256,
        num_layers: int = 3,
    ):
        super().__init__()
        check_at_least("num_latent_tokens", num_latent_tokens, 1, MAX_SIZE)
        check_at_least("latent_token_dim", latent_token_dim, 1, MAX_SIZE)
        check_at_least("num_latent_tokens * latent_token_dim", num_latent_tokens * latent_token_dim, 1, MAX_SIZE)
        check_at_least("num_classes", num_classes, 1, MAX_CLASSES)
        check_at_least("hidden_dim", hidden_dim, 1, MAX_SIZE)
        check_at_least("num_layers", num_layers, 1, MAX_LAYERS)
        self.token_shape = (num_latent_tokens, latent_token_dim)
        num_values = num_latent_tokens * latent_token_dim
        self.token_embedder = nn.Linear(num_values, hidden_dim)
        self.timestep_embedder = DoDTimestepEmbedding(hidden_dim)
        self.class_embedder = nn.Embedding(num_classes + 1, hidden_dim)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_dim, 3 * hidden_dim))
        self.blocks = nn.ModuleList([TokenPriorBlock(hidden_dim) for _ in range(num_layers)])
        self.norm_out = FP32LayerNorm(hidden_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(hidden_dim, num_values)
        # Those of the tokens of images. The means of classes, and of all images for the null class, are standardised.
        self.register_buffer("token_mean", torch.zeros(self.token_shape))
        self.register_buffer("token_std", torch.ones(self.token_shape))
        self.register_buffer("class_means", torch.zeros(num_classes + 1, *self.token_shape))
        nn.init.normal_(self.class_embedder.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    @torch.no_grad()
    def set_statistics(self, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Measures mean and deviation of the tokens of images, and the mean of each class, on the CPU.

        Args:
            tokens (`torch.Tensor` of shape `(n, N, d_e)`): Latent tokens of images of all classes.
            labels (`torch.Tensor` of shape `(n,)`): Class ids.

        Raises:
            `ValueError`, `TypeError`: the tokens have another type or shape, are not finite, or a class has none.
        """
        check_tensor("tokens", tokens, (None, *self.token_shape))
        if not bool(tokens.isfinite().all()):
            raise ValueError("`tokens` must be finite, got others.")
        num_classes = self.config.num_classes
        tokens, labels = tokens.cpu().double(), labels.cpu()  # not every device has float64
        counts = count_classes(labels, num_classes)
        std, mean = torch.std_mean(tokens, dim=0, correction=0)
        std = torch.where(std > 0, std, 1)
        standardised = (tokens - mean) / std
        sums = torch.zeros(num_classes, *self.token_shape, dtype=torch.float64)
        sums.index_add_(0, labels, standardised)
        means = torch.cat([sums / counts[:, None, None], standardised.mean(0, keepdim=True)])
        for buffer, values in ((self.token_mean, mean), (self.token_std, std), (self.class_means, means)):
            buffer.copy_(values)

    def forward(self, noisy_tokens: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """
        Predicts the velocity (noise - data) of noisy standardised tokens.

        Args:
            noisy_tokens (`torch.Tensor` of shape `(B, N, d_e)`): Standardised tokens x_sigma (paper, Eq. 1).
            timestep (`torch.Tensor` of shape `(B,)`): Times 1000 * sigma in [0, 1000].
            class_labels (`torch.Tensor` of shape `(B,)`): Class ids in [0, num_classes]; the last is the null class.

        Returns:
            `torch.Tensor` of shape `(B, N, d_e)`.

        Raises:
            `ValueError`, `TypeError`: the tokens have another type or shape.
        """
        check_tensor("noisy_tokens", noisy_tokens, (None, *self.token_shape))
        sigma = (timestep.float() / NUM_TRAIN_TIMESTEPS)[:, None]
        variance = sigma**2 + (1 - sigma) ** 2
        values = noisy_tokens.float().flatten(1)
        dtype = self.token_embedder.weight.dtype
        condition = self.timestep_embedder(timestep).to(dtype) + self.class_embedder(class_labels)
        modulation = self.modulation(condition).unflatten(1, (3, -1))
        hidden_states = self.token_embedder((values / variance.sqrt()).to(dtype))
        for block in self.blocks:
            hidden_states = block(hidden_states, modulation)
        output = self.proj_out(self.norm_out(hidden_states)).float()
        velocity = (2 * sigma - 1) / variance * values + output / variance.sqrt()
        return velocity.unflatten(1, self.token_shape).to(noisy_tokens.dtype)

    @torch.no_grad()
    def generate(
        self,
        class_labels: torch.Tensor,
        noise: torch.Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        truncation: float = 1.0,
    ) -> torch.Tensor:
        """
        Draws latent tokens of classes, by Euler steps of the flow from noise to data (paper, Eq. 2).

        Args:
            class_labels (`torch.Tensor` of shape `(B,)`): Class ids in [0, num_classes]; the last is the null class.
            noise (`torch.Tensor` of shape `(B, N, d_e)`): Standard normal noise.
            num_inference_steps (`int`, defaults to 50): Number of steps, >= 1.
            guidance_scale (`float`, defaults to 1.0): Scale of class guidance, >= 0; 1 is none.
            truncation (`float`, defaults to 1.0):
                Share in [0, 1] of the distance between tokens and the mean of their class that is kept: 1 keeps the
                tokens, 0 gives the mean of the class. Less is more typical and less varied.

        Returns:
            `torch.Tensor` of shape `(B, N, d_e)`: Latent tokens in fp32, for the latent embedder's decoder.

        Raises:
            `ValueError`, `TypeError`: an argument is out of range or of another type or shape.
        """
        check_at_least("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
        check_number("guidance_scale", guidance_scale, 0)
        check_number("truncation", truncation, 0, 1)
        check_label_ids("class_labels", class_labels, self.config.num_classes)
        check_tensor("noise", noise, (len(class_labels), *self.token_shape))
        tokens = noise.float()
        null_labels = torch.full_like(class_labels, self.config.num_classes)
        sigmas = torch.linspace(1, 0, num_inference_steps + 1).tolist()
        for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
            timestep = torch.full((len(tokens),), sigma * NUM_TRAIN_TIMESTEPS, device=tokens.device)
            velocity = self(tokens, timestep, class_labels)
            if guidance_scale != 1:
                velocity = classifier_free_guidance(velocity, self(tokens, timestep, null_labels), guidance_scale)
            tokens = euler_step(tokens, velocity, sigma, next_sigma)
        mean, std, means = (part.to(tokens) for part in (self.token_mean, self.token_std, self.class_means))
        if truncation != 1:
            tokens = means[class_labels].lerp(tokens, truncation)
        return mean + std * tokens


#: Settings of [`TokenPrior.generate`] that have a default -> the default.
GENERATION_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(TokenPrior.generate).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
