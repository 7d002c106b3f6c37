"""Copies what the package needs of the rest of the repository into its wheel; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


# Found by shipped.py.
SHIPPED = ("checkpoints", "training/accelerate", "training/desk", "training/recipes", "training/slurm")


class BuildWithShippedFiles(build_py):
    """Builds the package with the files that come with it. An editable installation finds them in the repository."""

    def run(self) -> None:
        """Runs the build."""
        super().run()
        if not self.editable_mode:
            shipped = Path(self.build_lib) / "diffusers_dod" / "shipped"
            shutil.rmtree(shipped, ignore_errors=True)
            for name in SHIPPED:
                shutil.copytree(name, shipped / name, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithShippedFiles})
