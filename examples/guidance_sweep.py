"""
Draws the same samples at several guidance scales: one column per scale, one row per class, from one stage 1.

    python examples/guidance_sweep.py --guidance_scales 1 2 3 5 8 --output outputs/guidance_sweep.png
"""

import argparse
from pathlib import Path

from diffusers_dod import DoDPipeline, Guidance, desk_checkpoint
from diffusers_dod.command_line import run_main
from diffusers_dod.data.image_grid import make_grid
from diffusers_dod.files import check_output


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=desk_checkpoint())
    parser.add_argument("--class_labels", nargs="+", default=["checks", "rings", "marble", "bricks", "spiral"])
    parser.add_argument("--guidance_scales", nargs="+", type=float, default=[1.0, 2.0, 3.0, 5.0, 8.0])
    parser.add_argument("--guidance_rescale", type=float, default=0.0, help="From 0 to 1, against oversaturation.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/guidance_sweep.png"))
    args = parser.parse_args(argv)
    check_output("output", args.output, suffix=".png")

    pipe = DoDPipeline.from_pretrained(args.pipeline)
    first = pipe(args.class_labels, num_stages=1, seed=args.seed, output_type="latent")
    columns = [
        pipe(
            args.class_labels,
            num_stages=2,
            prior_latents=first.images,
            guidance_scale=scale,
            guidance=Guidance(rescale=args.guidance_rescale),
            seed=args.seed,
        ).images
        for scale in args.guidance_scales
    ]
    rows = [list(row) for row in zip(*columns, strict=True)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    make_grid(
        rows,
        scale=max(1, 96 // rows[0][0].width),
        gap=4,
        title=f"stage 2, seed {args.seed}",
        column_names=[f"scale {scale:g}" for scale in args.guidance_scales],
        row_names=args.class_labels,
    ).save(args.output)
    print(f"Wrote {args.output}: {len(rows)} classes at scales {', '.join(map(str, args.guidance_scales))}.")


if __name__ == "__main__":
    run_main(main)
