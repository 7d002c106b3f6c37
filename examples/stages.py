"""
Draws the stages of some samples side by side: one row per sample, stage 1 on the left.

    python examples/stages.py --class_label bricks --num_stages 4 --output outputs/stages.png
"""

import argparse
from pathlib import Path

from diffusers_dod import DoDPipeline, desk_checkpoint
from diffusers_dod.command_line import run_main
from diffusers_dod.data.image_grid import make_grid
from diffusers_dod.files import check_output


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=desk_checkpoint())
    parser.add_argument("--class_label", default="bricks")
    parser.add_argument("--num_samples", type=int, default=6)
    parser.add_argument("--num_stages", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/stages.png"))
    args = parser.parse_args(argv)
    check_output("output", args.output, suffix=".png")

    pipe = DoDPipeline.from_pretrained(args.pipeline)
    output = pipe(
        args.class_label,
        num_images_per_label=args.num_samples,
        num_stages=args.num_stages,
        seed=args.seed,
        return_stages=True,
    )
    rows = [list(row) for row in zip(*output.stages, strict=True)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    make_grid(
        rows,
        scale=max(1, 96 // rows[0][0].width),
        gap=4,
        title=f"{args.class_label}, seed {args.seed}",
        column_names=[f"stage {stage + 1}" for stage in range(args.num_stages)],
    ).save(args.output)
    print(f"Wrote {args.output}: {len(rows)} samples of {args.class_label} in {args.num_stages} stages.")


if __name__ == "__main__":
    run_main(main)
