"""
Makes a folder of images to try a training on: crops of photographs that come with scikit-image, a class for each.

    python examples/own_images.py --output_dir outputs/own-images

It holds 8 sub-folders of 200 images of 64 x 64 pixels, in seconds and without a download.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from diffusers_dod.command_line import run_main
from diffusers_dod.files import check_output


# Class -> photograph of `skimage.data`. All of them are in its wheel.
CLASSES = {
    "astronaut": data.astronaut,
    "cat": data.chelsea,
    "coffee": data.coffee,
    "galaxies": data.hubble_deep_field,
    "motorcycle": lambda: data.stereo_motorcycle()[0],
    "retina": data.retina,
    "rocket": data.rocket,
    "tissue": data.immunohistochemistry,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/own-images"))
    parser.add_argument("--images_per_class", type=int, default=200)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.images_per_class < 1 or args.resolution < 1:
        parser.error("`images_per_class` and `resolution` must be positive integers.")
    check_output("output_dir", args.output_dir, is_folder=True)

    rng = np.random.default_rng(args.seed)
    for name, load in CLASSES.items():
        photograph = Image.fromarray(load()).convert("RGB")
        folder = args.output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(args.images_per_class):
            side = int(min(photograph.size) * rng.uniform(0.2, 0.4))
            left, top = (int(rng.integers(length - side + 1)) for length in photograph.size)
            crop = photograph.crop((left, top, left + side, top + side))
            crop.resize((args.resolution,) * 2, Image.Resampling.LANCZOS).save(folder / f"{index:04d}.png")
    print(f"Wrote {len(CLASSES) * args.images_per_class} images of {len(CLASSES)} classes: {args.output_dir}.")


if __name__ == "__main__":
    run_main(main)
