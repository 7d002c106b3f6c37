"""
Checks the folders of ImageNet (ILSVRC 2012) before anything is encoded: class folders, their order, numbers of images.

    python examples/check_imagenet.py path/to/imagenet/train
    python examples/check_imagenet.py path/to/imagenet/val --split val

It lists what is wrong and then ends with 1. It reads names only, so it takes as long as listing 1,281,167 files.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path


# Of the 1,000 wnids in ascending order, joined by line breaks. In this order ADM, DiT and SiT count the classes.
WNIDS_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
NUM_IMAGES = {"train": 1_281_167, "val": 50_000}
ENDINGS = (".jpeg", ".jpg", ".png")
SHOWN = {0: "tench", 207: "golden retriever", 281: "tabby cat", 388: "giant panda", 980: "volcano"}


def find_errors(folder: Path, split: str) -> list[str]:
    """
    Finds what is wrong with a folder of ImageNet.

    Args:
        folder (`Path`): Folder with a sub-folder for each wnid.
        split (`str`): `"train"` or `"val"`.

    Returns:
        `list[str]`: A line for each error.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    errors = []
    if len(names) != 1000:
        errors.append(f"There must be 1,000 folders, got {len(names):,}.")
    elif hashlib.sha256("\n".join(names).encode()).hexdigest() != WNIDS_SHA256:
        errors.append(f"The folders must have the wnids of ILSVRC 2012 for names, got {names[0]} to {names[-1]}.")
    counts = {name: sum(entry.name.lower().endswith(ENDINGS) for entry in os.scandir(folder / name)) for name in names}
    if (total := sum(counts.values())) != NUM_IMAGES[split]:
        errors.append(f"There must be {NUM_IMAGES[split]:,} images, got {total:,}.")
    if split == "val" and (other := [name for name, count in counts.items() if count != 50]):
        errors.append(
            f"Each class must have 50 images, got {counts[other[0]]} of {other[0]} and {len(other)} such classes."
        )
    if not errors:
        print("\n".join(f"class {index:3}  {names[index]}  {name}" for index, name in SHOWN.items()))
    return errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder with a sub-folder for each class.")
    parser.add_argument("--split", choices=tuple(NUM_IMAGES), default="train")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"`folder` must exist, got {args.folder}.")
    if errors := find_errors(args.folder, args.split):
        sys.exit("\n".join(errors))
    print(f"{args.folder} is whole: {NUM_IMAGES[args.split]:,} images of 1,000 classes.")


if __name__ == "__main__":
    main()
