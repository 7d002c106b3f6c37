"""
Samples the checkpoint of this repository in two stages, from one seed.

The image has stage 1 above stage 2, and one column per class.

    python examples/quickstart.py --output outputs/demo.png
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from diffusers_dod import DoDPipeline, desk_checkpoint
from diffusers_dod.command_line import run_main
from diffusers_dod.files import check_output


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=desk_checkpoint())
    parser.add_argument("--samples_per_class", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"))
    args = parser.parse_args(argv)
    check_output("output", args.output, suffix=".png")

    pipe = DoDPipeline.from_pretrained(args.pipeline)
    names = list(pipe.label2ids)
    labels = [name for name in names for _ in range(args.samples_per_class)]
    stages = pipe(class_labels=labels, generator=torch.Generator().manual_seed(args.seed), return_stages=True).stages

    # Classes side by side, the samples of a class below each other, one panel per stage.
    side, gap, margin, header = 2 * stages[0][0].width, 4, 92, 22
    font = ImageFont.load_default(size=14)
    panel = args.samples_per_class * (side + gap) + 3 * gap
    grid = Image.new("RGB", (margin + len(names) * (side + gap), header + len(stages) * panel), "white")
    draw = ImageDraw.Draw(grid)
    for column, name in enumerate(names):
        draw.text((margin + column * (side + gap) + side / 2, header / 2), name, "black", font, anchor="mm")
    for row, images in enumerate(stages):
        top = header + row * panel
        draw.text((gap, top + panel / 2), f"stage {row + 1}", "black", font, anchor="lm")
        for index, image in enumerate(images):
            column, line = divmod(index, args.samples_per_class)
            enlarged = image.resize((side, side), Image.Resampling.NEAREST)
            grid.paste(enlarged, (margin + column * (side + gap), top + line * (side + gap)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    grid.save(args.output)
    print(f"Wrote {args.output}: {len(labels)} samples of {len(names)} classes in {len(stages)} stages.")


if __name__ == "__main__":
    run_main(main)
