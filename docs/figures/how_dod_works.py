"""
Draws the figures of docs/how_dod_works.md from a pipeline, seed 0, nothing picked; needs matplotlib:

    python docs/figures/how_dod_works.py --pipeline checkpoints/dod-desk --output_dir docs/images
"""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from diffusers_dod import DoDPipeline
from diffusers_dod.data.textures import TEXTURE_CLASSES, render_texture
from diffusers_dod.rectified_flow import euler_step
from diffusers_dod.seeding import stateless_noise


SEED = 0
IMAGE_SEED = 101  # the checkpoint has not seen images of this seed
MODEL, EMBEDDER, DATA, CONDITION = "#CFE3F5", "#FBE3C0", "#F0F0F0", "#D3EDDF"


def draw_grid(path: Path, rows: list[list[Image.Image | None]], row_titles: list[str], titles: list[str]) -> None:
    """Images in rows with titles on the left and on top; `None` leaves a place empty."""
    figure = Figure(figsize=(1.3 + 0.95 * len(titles), 0.35 + 0.95 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, (images, row_title) in enumerate(zip(rows, row_titles, strict=True)):
        for column, image in enumerate(images):
            ax = axes[row, column]
            ax.set(xticks=[], yticks=[], frame_on=False)
            if image is not None:
                ax.imshow(image, interpolation="nearest")
            if row == 0:
                ax.set_title(titles[column], fontsize=9)
        axes[row, 0].set_ylabel(row_title, rotation=0, ha="right", va="center", fontsize=9)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    figure.savefig(path, dpi=100)
    print(f"Wrote {path}.")


def trajectory(pipe: DoDPipeline, label: str, num_columns: int = 6) -> tuple[list, list[str]]:
    """
    Rows of x_sigma and of the prediction of x_0 at some times, for stage 1 and stage 2, and the times.

    The velocity is read off each Euler step, guided as it is, and a step of it from sigma to 0 is the prediction.
    """
    config, rows = pipe.transformer.config, []
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noises = [stateless_noise(shape, SEED, stage) for stage in (1, 2)]
    latents = []

    def collect(pipe, step, timestep, inputs):
        latents.append(inputs["latents"])
        return {}

    pipe(label, num_stages=2, latents=noises, callback_on_step_end=collect, output_type="latent")
    num_steps = len(latents) // 2
    sigmas = [1 - step / num_steps for step in range(num_steps + 1)]
    shown = [round(index * num_steps / (num_columns - 1)) for index in range(num_columns)]
    for stage, noise in enumerate(noises):
        path = [noise, *latents[stage * num_steps : (stage + 1) * num_steps]]
        predictions = []
        for step in range(num_steps):
            velocity = (path[step + 1] - path[step]) / (sigmas[step + 1] - sigmas[step])
            predictions.append(euler_step(path[step], velocity, sigmas[step], 0.0))
        predictions.append(path[-1])
        for states in (path, predictions):
            rows.append(pipe.decode_latents(torch.cat([states[step] for step in shown]), "pil"))
    return rows, [f"σ = {sigmas[step]:.1f}" for step in shown]


def draw_box(ax: Axes, x: float, y: float, text: str, color: str, width: float = 1.5, height: float = 0.8) -> None:
    """A box around (x, y)."""
    corner = (x - width / 2, y - height / 2)
    ax.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0.03,rounding_size=0.1", fc=color, ec="#444444"))
    ax.text(x, y, text, ha="center", va="center", fontsize=9.5)


def draw_arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow with a text above its middle."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444444", "shrinkA": 0, "shrinkB": 0})
    ax.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.1, text, ha="center", fontsize=8.5)


def draw_diagram(path: Path) -> None:
    """Sampling in two stages, and training."""
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(0, 15.2), ylim=(0, 7.6), aspect="equal")
    ax.axis("off")

    ax.text(0.1, 7.3, "Sampling", fontsize=12, weight="bold")
    for stage, y in ((1, 6.2), (2, 3.2)):
        ax.text(0.1, y, f"Stage {stage}", fontsize=10.5, va="center")
        draw_box(ax, 2.2, y, f"fresh noise\n$z_1^{stage}$", DATA)
        draw_box(ax, 5.9, y, "backbone, N steps\nfrom σ = 1 to 0", MODEL, 2.4)
        draw_box(ax, 9.6, y, f"sample\n$z_0^{stage}$", DATA)
        draw_arrow(ax, (3.0, y), (4.65, y))
        draw_arrow(ax, (7.15, y), (8.8, y))
    draw_box(ax, 5.9, 7.25, "c = time + class + S", CONDITION, 2.6, 0.5)
    draw_arrow(ax, (5.9, 6.97), (5.9, 6.63))
    draw_box(ax, 9.6, 4.7, "LEM encoder", EMBEDDER, 1.7, 0.6)
    draw_arrow(ax, (9.6, 5.77), (9.6, 5.03))
    for token in range(4):
        ax.add_patch(Rectangle((7.86 + 0.15 * token, 4.5), 0.11, 0.4, fc=CONDITION, ec="#444444"))
    ax.text(8.14, 5.02, "tokens", ha="center", fontsize=8.5)
    draw_arrow(ax, (8.72, 4.7), (8.46, 4.7))
    draw_arrow(ax, (7.82, 4.7), (7.5, 4.7))
    draw_box(ax, 6.6, 4.7, "LEM decoder", EMBEDDER, 1.7, 0.6)
    draw_arrow(ax, (5.72, 4.7), (5.1, 4.7))
    draw_box(ax, 3.6, 4.7, "c = time + class + $e_s$,\none for each patch", CONDITION, 2.9, 0.7)
    draw_arrow(ax, (4.3, 4.32), (5.2, 3.63))
    draw_arrow(ax, (10.4, 3.2), (11.4, 3.2))
    draw_box(ax, 12.3, 3.2, "autoencoder's\ndecoder", DATA, 1.7)
    draw_arrow(ax, (13.2, 3.2), (13.9, 3.2))
    ax.text(14.0, 3.2, "image", fontsize=10, va="center")
    ax.text(10.6, 4.7, "further stages\nstart here again", fontsize=8.5, va="center")
    ax.text(5.9, 5.58, "the same backbone in all stages", fontsize=8.5, ha="center", va="center")
    ax.text(5.9, 2.6, "guided against c = time + null class + S", fontsize=8.5, ha="center", va="center")

    ax.plot([0.1, 15.1], [2.35, 2.35], color="#AAAAAA", linewidth=0.8)
    ax.text(0.1, 1.95, "Training", fontsize=12, weight="bold")
    draw_box(ax, 2.2, 1.0, "real latents\n$x_0$", DATA)
    draw_box(ax, 5.2, 1.55, "LEM", EMBEDDER, 1.2, 0.5)
    draw_box(ax, 5.2, 0.45, "(1 − σ) $x_0$ + σ noise", DATA, 2.2, 0.5)
    draw_arrow(ax, (3.0, 1.2), (4.55, 1.55))
    draw_arrow(ax, (3.0, 0.8), (4.05, 0.45))
    draw_box(ax, 8.2, 1.55, "c = time + class + $e_s$,\nor + S with probability $p_s$", CONDITION, 2.9, 0.7)
    draw_arrow(ax, (5.85, 1.55), (6.7, 1.55))
    draw_box(ax, 11.4, 1.0, "backbone", MODEL, 1.5, 0.8)
    draw_arrow(ax, (9.7, 1.4), (10.6, 1.2))
    draw_arrow(ax, (6.35, 0.45), (10.6, 0.8))
    draw_arrow(ax, (12.2, 1.0), (12.8, 1.0))
    ax.text(12.9, 1.0, "mean of\n(noise − $x_0$ − v)²", fontsize=10, va="center")
    figure.savefig(path, dpi=90)
    print(f"Wrote {path}.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="checkpoints/dod-desk")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"))
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw_diagram(args.output_dir / "how_diagram.png")

    pipe = DoDPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor

    def render(name: str) -> Image.Image:
        return Image.fromarray(render_texture(TEXTURE_CLASSES.index(name), IMAGE_SEED, side)[0])

    rows, titles = trajectory(pipe, "bricks")
    row_titles = ["stage 1: $x_σ$", "stage 1: predicted $x_0$", "stage 2: $x_σ$", "stage 2: predicted $x_0$"]
    draw_grid(args.output_dir / "how_trajectory.png", rows, row_titles, titles)

    names, scales = ["checks", "marble"], [1.0, 2.0, 3.0, 5.0, 8.0]
    first = pipe(names, num_stages=1, seed=SEED, output_type="latent").images
    stages = [
        [pipe(names, num_stages=1, guidance_scale=[scale], seed=SEED).images for scale in scales],
        [pipe(names, num_stages=2, prior_latents=first, guidance_scale=scale, seed=SEED).images for scale in scales],
    ]
    rows = [[images[index] for images in stage] for index in range(len(names)) for stage in stages]
    row_titles = [f"{name}, stage {stage}" for name in names for stage in (1, 2)]
    draw_grid(args.output_dir / "how_guidance.png", rows, row_titles, [f"scale {scale:g}" for scale in scales])

    labels, prior_names = ["bricks", "rings", "wood"], ["bricks", "rings", "wood", "marble", "dots", "plaid"]
    originals = [render(name) for name in prior_names]
    tokens = pipe.get_prior_tokens(image=originals)
    noise = stateless_noise((1, *first.shape[1:]), SEED, 2).expand(len(originals), -1, -1, -1)
    rows = [originals]
    for label in labels:
        images = pipe([label] * len(originals), num_stages=2, prior_tokens=tokens, latents=[noise]).images
        rows.append(images)
    row_titles = ["image", *(f"class {label}" for label in labels)]
    draw_grid(args.output_dir / "how_priors.png", rows, row_titles, prior_names)

    names, num_noises = ["stripes", "bricks", "sphere", "voronoi"], 5
    originals, rows = [render(name) for name in names], []
    decoded = pipe.decode_latents(pipe.encode_image(pipe.image_processor.preprocess(originals)), "pil")
    for name, original, through_autoencoder in zip(names, originals, decoded, strict=True):
        images = pipe(name, num_stages=2, image=original, num_images_per_prior=num_noises, seed=SEED).images
        rows.append([original, through_autoencoder, *images])
    titles = ["image", "autoencoder", *(f"noise {number + 1}" for number in range(num_noises))]
    draw_grid(args.output_dir / "how_bottleneck.png", rows, names, titles)


if __name__ == "__main__":
    main()
