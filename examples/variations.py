"""
Draws variations of an image of your own: it gives the visual prior in place of stage 1, and many images are drawn.

With a second image the figure also has the priors in between, one row each.

    python examples/variations.py --image image.png --class_label marble --output outputs/variations.png
    python examples/variations.py --image one.png --second_image two.png --class_label marble
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from diffusers_dod import DoDPipeline, desk_checkpoint
from diffusers_dod.command_line import run_main
from diffusers_dod.data.image_grid import make_grid
from diffusers_dod.files import check_output
from diffusers_dod.image_reading import center_crop, to_image


def load(path: Path, side: int) -> Image.Image:
    """The centre of an image at the size of the model."""
    return Image.fromarray(center_crop(to_image(path), side))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=desk_checkpoint())
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--second_image", type=Path)
    parser.add_argument("--class_label", default="marble")
    parser.add_argument("--num_images", type=int, default=8)
    parser.add_argument("--num_priors", type=int, default=5, help="From the first image to the second.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/variations.png"))
    args = parser.parse_args(argv)
    check_output("output", args.output, suffix=".png")

    pipe = DoDPipeline.from_pretrained(args.pipeline)
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    originals = [load(path, side) for path in (args.image, args.second_image) if path is not None]
    tokens = pipe.get_prior_tokens(image=originals)
    weights = torch.linspace(0, 1, args.num_priors if len(originals) > 1 else 1).tolist()
    rows = []
    for weight in weights:
        prior_tokens = torch.lerp(tokens[:1], tokens[-1:], weight)
        images = pipe(
            args.class_label,
            num_stages=2,
            prior_tokens=prior_tokens,
            num_images_per_prior=args.num_images,
            seed=args.seed,
        ).images
        # The images themselves stand in front of their own variations.
        original = {0.0: originals[0], 1.0: originals[-1]}.get(weight, Image.new("RGB", (side, side), "white"))
        rows.append([original, *images])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    make_grid(
        rows,
        scale=max(1, 96 // side),
        gap=4,
        title=f"{args.class_label}, stage 2, seed {args.seed}",
        column_names=["image"] + ["variation"] * args.num_images,
        row_names=[f"prior {weight:.2f}" for weight in weights],
    ).save(args.output)
    print(f"Wrote {args.output}: {len(weights)} priors, {args.num_images} images of {args.class_label} of each.")


if __name__ == "__main__":
    run_main(main)
