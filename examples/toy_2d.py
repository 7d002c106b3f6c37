"""
DoD in the plane: shows what a stage, the visual prior and guidance do. It takes a minute of one CPU core and
matplotlib.

    OMP_NUM_THREADS=1 python examples/toy_2d.py --output outputs/toy_2d.png

Three classes lie on thin wavy curves, and a small network learns them by rectified flow. As in DoD it is conditioned
on c = time + class + prior, or on c = time + class + S without a prior (paper, Eq. 5). An encoder compresses a point
to one number, or without a bottleneck to two, and a decoder makes the prior of it. All parts are trained together,
with a prior for half of the points. docs/how_dod_works.md explains the figure.

Two distances from the data stand under every image, averages over the classes: W, the sliced Wasserstein distance
of the distributions, and d, the mean distance to the nearest point. Under `data` are those of other data.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from diffusers_dod import DoDFlowMatchScheduler
from diffusers_dod.command_line import run_main
from diffusers_dod.files import check_output
from diffusers_dod.guidance import classifier_free_guidance
from diffusers_dod.rectified_flow import NUM_TRAIN_TIMESTEPS, interpolate, logit_normal_sigma, velocity_target
from diffusers_dod.transformer_dod import DoDTimestepEmbedding


COLORS = ("#0072B2", "#E69F00", "#009E73")  # of the classes
NULL_CLASS, DIM = len(COLORS), 96


def draw_data(class_labels: torch.Tensor) -> torch.Tensor:
    """Points (B, 2) of the classes: each is an arm of a spiral, and swings four times."""
    position = torch.rand(len(class_labels))
    angle = 2 * torch.pi / len(COLORS) * class_labels + 3.5 * position
    radius = 0.35 + 1.9 * position + 0.15 * torch.sin(8 * torch.pi * position)
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return points + 0.03 * torch.randn_like(points)


def mlp(in_features: int, out_features: int) -> nn.Sequential:
    """Four Linears."""
    inner = [layer for _ in range(2) for layer in (nn.SiLU(), nn.Linear(DIM, DIM))]
    return nn.Sequential(nn.Linear(in_features, DIM), *inner, nn.SiLU(), nn.Linear(DIM, out_features))


class ToyDoD(nn.Module):
    """A velocity field in the plane; the prior is decoded from `code_dim` numbers."""

    def __init__(self, code_dim: int):
        super().__init__()
        self.time_embed, self.class_embed = DoDTimestepEmbedding(DIM), nn.Embedding(NULL_CLASS + 1, DIM)
        self.sample_token = nn.Parameter(torch.zeros(1, DIM))
        self.latent_embedder = nn.Sequential(mlp(2, code_dim), mlp(code_dim, DIM))  # encoder, decoder
        self.backbone = mlp(2 + DIM, 2)

    def forward(self, points, timestep, class_labels, prior):
        """The velocity at `points` (B, 2); `prior` is (B, DIM), or (1, DIM) for S."""
        c = self.time_embed(timestep) + self.class_embed(class_labels) + prior
        return self.backbone(torch.cat([points, c], dim=1))


def train(model: ToyDoD, max_train_steps: int, batch_size: int = 256, learning_rate: float = 4e-3) -> None:
    """Rectified flow with the class dropped with probability 0.1 and the prior with p_s = 0.5."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, max_train_steps)
    for _ in range(max_train_steps):
        class_labels = torch.randint(NULL_CLASS, (batch_size,))
        data, noise = draw_data(class_labels), torch.randn(batch_size, 2)
        sigma = logit_normal_sigma(torch.randn(batch_size))
        class_labels[torch.rand(batch_size) < 0.1] = NULL_CLASS
        prior = torch.where(torch.rand(batch_size, 1) < 0.5, model.sample_token, model.latent_embedder(data))
        velocity = model(interpolate(data, noise, sigma), NUM_TRAIN_TIMESTEPS * sigma, class_labels, prior)
        optimizer.zero_grad()
        F.mse_loss(velocity, velocity_target(data, noise)).backward()
        optimizer.step()
        lr_scheduler.step()


@torch.no_grad()
def sample(model, noise, class_labels, guidance_scale=1.0, previous=None) -> torch.Tensor:
    """Points (B, 2) of stage 1, or of the stage after the one whose points are `previous`."""
    prior = model.sample_token if previous is None else model.latent_embedder(previous)
    null_labels = torch.full_like(class_labels, NULL_CLASS)

    def velocity(points, timestep, indices):
        conditional = model(points, timestep[None], class_labels, prior)
        unconditional = model(points, timestep[None], null_labels, model.sample_token)
        return classifier_free_guidance(conditional, unconditional, guidance_scale)

    scheduler = DoDFlowMatchScheduler(solver="heun")
    scheduler.set_timesteps(25)
    return scheduler.solve(velocity, noise).prev_sample


def distances(points: torch.Tensor, data: torch.Tensor) -> tuple[float, float]:
    """W over 64 directions and d, see above; as many points of each class, one class after the other."""
    points, data = points.unflatten(0, (len(COLORS), -1)), data.unflatten(0, (len(COLORS), -1))
    angles = torch.pi / 64 * torch.arange(64)
    directions = torch.stack([angles.cos(), angles.sin()])
    sliced = (points @ directions).sort(dim=1).values - (data @ directions).sort(dim=1).values
    pairwise = torch.cdist(points, data, compute_mode="donot_use_mm_for_euclid_dist")  # which would lose digits
    return sliced.abs().mean().item(), pairwise.amin(dim=2).mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=int, default=6000, help="Of each of the two models.")
    parser.add_argument("--num_samples", type=int, default=3000, help="Of each class.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/toy_2d.png"))
    args = parser.parse_args(argv)
    check_output("output", args.output, suffix=".png")

    torch.manual_seed(args.seed)
    model, without_bottleneck = ToyDoD(code_dim=1), ToyDoD(code_dim=2)
    train(model, args.max_train_steps)
    train(without_bottleneck, args.max_train_steps)
    class_labels = torch.arange(NULL_CLASS).repeat_interleave(args.num_samples)
    data, other_data = draw_data(class_labels), draw_data(class_labels)
    noise = torch.randn(2, *data.shape)  # of each stage
    stage_1 = sample(model, noise[0], class_labels)
    its_stage_1 = sample(without_bottleneck, noise[0], class_labels)
    stage_2 = {scale: sample(model, noise[1], class_labels, scale, stage_1) for scale in (1, 2, 4)}
    panels = {
        "data": other_data,
        "stage 1": stage_1,
        "stage 1, guidance scale 2": sample(model, noise[0], class_labels, 2),
        **{f"stage 2, guidance scale {scale}": points for scale, points in stage_2.items()},
        "stage 2, scale 2, no bottleneck": sample(without_bottleneck, noise[1], class_labels, 2, its_stage_1),
    }

    figure = Figure(figsize=(11, 6.6), layout="constrained")
    form = {"xlim": (-2.6, 2.6), "ylim": (-2.6, 2.6), "xticks": [], "yticks": [], "aspect": "equal"}
    axes = list(figure.subplots(2, 4, subplot_kw=form).flat)
    colors = [COLORS[label] for label in class_labels]
    ax = axes.pop(3)
    ax.set(title="from stage 1 (dots) to stage 2", xlabel="at guidance scale 2; data in grey")
    ax.scatter(*data.T, s=1, c="#E4E4E4", linewidths=0)
    for index in range(0, len(data), max(1, args.num_samples // 80)):
        line = torch.stack([stage_1[index], stage_2[2][index]])
        ax.plot(*line.T, color=colors[index], linewidth=1.2, marker="o", markersize=2, markevery=[0])
    for ax, (title, points) in zip(axes, panels.items(), strict=True):
        wasserstein, nearest = distances(points, data)
        print(f"{title:32} W = {wasserstein:.4f}  d = {nearest:.4f}")
        ax.set(title=title, xlabel=f"W = {wasserstein:.3f}   d = {nearest:.3f}")
        ax.scatter(*points.T, s=1, c=colors, linewidths=0)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=100)
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    run_main(main)
