# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Files that come with the package: the desk-size checkpoint and its judge, recipes and configurations of accelerate.

They lie at the same paths in the repository and in an installed package, below a folder of its own there (`setup.py`).
So the commands that are published with results hold in both.
"""

from pathlib import Path
from typing import TypeVar


P = TypeVar("P", str, Path)

_INSTALLED = Path(__file__).parent / "shipped"
ROOT = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2]
RECIPES = Path("training/recipes")


def find_shipped(path: P) -> P:
    """
    Finds a file or folder of the user, or else the one of the same relative path that comes with the package.

    Args:
        path (`str` or `Path`): The path, e.g. `training/desk/texture_features.py`.

    Returns:
        `str | Path`: The path itself if something is there, or if nothing comes with the package under that path. It
        has the type of the argument.
    """
    shipped = ROOT / path
    is_other = Path(path).exists() or ".." in Path(path).parts or not shipped.exists()
    return path if is_other else type(path)(shipped)


def find_recipe(recipe: Path, name: str = "config") -> Path:
    """
    Finds a recipe of the trainer.

    Args:
        recipe (`Path`): A file, or the name of one that comes with the package, e.g. `dod-b-imagenet256`.
        name (`str`, defaults to `"config"`): Name of the argument, for the message.

    Returns:
        `Path`: The file.

    Raises:
        `ValueError`: there is no such file or name. The message lists the names.
    """
    named = ROOT / RECIPES / f"{recipe}.yaml"
    for path in (find_shipped(Path(recipe)), named):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in (ROOT / RECIPES).glob("*.yaml")))
    raise ValueError(f"`{name}` must be a YAML file, or one of the recipes {known}, got {str(recipe)!r}.")


def desk_checkpoint() -> Path:
    """
    Finds the pipeline that comes with the package: two stages, 12 classes of procedural textures, 32 x 32 pixels.

    Returns:
        `Path`: Folder of the pipeline, which `DoDPipeline.from_pretrained` takes.

    Raises:
        `FileNotFoundError`: the package was installed without it.
    """
    folder = ROOT / "checkpoints" / "dod-desk"
    if not folder.is_dir():
        raise FileNotFoundError(f"The package must have been installed whole, got none of its checkpoints in {ROOT}.")
    return folder
