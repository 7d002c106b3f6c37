# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Downloads a pipeline from the Hugging Face Hub and prints its folder:

    dod download user/dod-b                       into the cache, where all commands find it by its name
    dod download user/dod-b --output_dir dod-b    into a folder

Only weights in safetensors, configs and texts come: nothing that could run code.
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from .checkpoint_manifest import INDEX
from .checks import abbreviate
from .command_line import run_main
from .options import option, parse_options


PATTERNS = ("*.safetensors", "*.json", "*.jsonl", "*.yaml", "*.md", "*.txt", "*.png")


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """Options of the command."""

    repo_id: str = option(is_positional=True, help="Repository on the Hub.")
    revision: str | None = option(None, help="Branch, tag or commit; the newest by default.")
    output_dir: Path | None = option(None, writes="folder", help="Folder of the files, by default in the cache.")


def download(repo_id: str, revision: str | None = None, output_dir: Path | None = None) -> Path:
    """
    Downloads a pipeline. Files that are there already do not come again.

    Args:
        repo_id (`str`): Repository on the Hub.
        revision (`str`, *optional*): Branch, tag or commit. By default the newest commit.
        output_dir (`Path`, *optional*): Folder of the files. By default one in the cache.

    Returns:
        `Path`: The folder.

    Raises:
        `OSError`: there is no such repository, or it cannot be reached.
        `ValueError`: it holds no pipeline, or the folder has other files.
    """
    if output_dir is not None and output_dir.is_dir():
        if any(output_dir.iterdir()) and not (output_dir / ".cache" / "huggingface").is_dir():
            raise ValueError(
                f"`output_dir` must be a new or empty folder, or one of an earlier download, got {output_dir} with "
                "other files."
            )
    files = _list_files(repo_id, revision)
    if files is not None and INDEX not in files:  # before anything comes
        found = abbreviate(sorted(files)) or "no files"
        raise ValueError(f"`repo_id` must hold a pipeline, with a {INDEX}, got {repo_id!r} with {found}.")
    try:
        folder = snapshot_download(repo_id, revision=revision, local_dir=output_dir, allow_patterns=PATTERNS)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        name = repo_id if revision is None else f"{repo_id}@{revision}"
        raise OSError(
            f"`repo_id` must be a repository on the Hub that can be reached, got {name!r}: {reason}"
        ) from error
    if not (Path(folder) / INDEX).is_file():  # what the cache has of it
        raise ValueError(f"`repo_id` must hold a pipeline, with a {INDEX}, got {repo_id!r}.")
    return Path(folder)


def _list_files(repo_id: str, revision: str | None) -> list[str] | None:
    """Names of the files of a repository; `None` if it cannot be reached, of which the download knows more."""
    try:
        return HfApi().list_repo_files(repo_id, revision=revision)
    except Exception:  # errors of the client's connections have no base of their own
        return None


def main(argv: list[str] | None = None) -> None:
    """Runs the command; `argv` defaults to the process's arguments. Raises as [`download`] does."""
    options = parse_options(DownloadOptions, argv, __doc__)
    print(download(options.repo_id, options.revision, options.output_dir))


if __name__ == "__main__":
    run_main(main)
