"""
Makes a release: checks it, builds wheel and sdist into dist/, installs both in an empty environment, and sets the tag.

    make release                       all of it, for the version of pyproject.toml
    make release OPTIONS=--dry_run     builds and installs what is committed, without a tag, whatever its version

Nothing leaves this machine: what to push and to upload is printed at the end. The installation asks the package index.
"""

import argparse
import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[1]
PLACEHOLDER = "OWNER"  # in the address of the project's home
BUILD = "import sys, setuptools.build_meta as backend\nprint(getattr(backend, sys.argv[1])(sys.argv[2]))"
SMOKE = (
    "from diffusers_dod import DoDPipeline, desk_checkpoint\n"
    "pipe = DoDPipeline.from_pretrained(desk_checkpoint())\n"
    "assert len(pipe('marble', seed=0, num_inference_steps=2).images) == 1\n"
)


def run(*command: object, **kwargs) -> str:
    """Runs a command to its success, and returns its output."""
    return subprocess.run(
        list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, **kwargs
    ).stdout.strip()


def find_problems(root: Path) -> list[str]:
    """
    Finds what forbids a release of the files in a folder.

    Args:
        root (`Path`): A clone of the repository.

    Returns:
        `list[str]`: A line for each problem.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    version = project["version"]
    problems = []
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        problems.append(f"The version in pyproject.toml must be one of a release, got {version}.")
    for name, pattern in (
        ("src/diffusers_dod/__init__.py", r'^__version__ = "(.*)"'),
        ("CITATION.cff", r"^version: (.*)"),
    ):
        found = re.search(pattern, (root / name).read_text(), re.MULTILINE)[1]
        if found != version:
            problems.append(f"The version in {name} must be {version}, got {found}.")
    heading = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    if not re.fullmatch(re.escape(version) + r" \(\d{4}-\d\d-\d\d\)", heading):
        problems.append(f"The first heading of CHANGELOG.md must be '{version} (year-month-day)', got '{heading}'.")
    if PLACEHOLDER in project["urls"]["Repository"]:
        problems.append(f"The project's home must be known, got {project['urls']['Repository']}.")
    if run("git", "status", "--porcelain", cwd=root):
        problems.append("All changes must be committed.")
    if run("git", "tag", "--list", f"v{version}", cwd=root):
        problems.append(f"The tag v{version} must be new.")
    return problems


def make_links_absolute(text: str, home: str, revision: str) -> str:
    """
    Makes relative links of a page lead to the project's home, and its images come from there.

    Args:
        text (`str`): The page in Markdown.
        home (`str`): Address of the repository.
        revision (`str`): Tag or commit.

    Returns:
        `str`: The page, which reads well anywhere.
    """
    text = re.sub(r"(!\[[^\]]*\]\()(?!\w+:)([^)]+)\)", rf"\1{home}/raw/{revision}/\2)", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!\w+:|#)([^)]+)\)", rf"\1{home}/blob/{revision}/\2)", text)


def normalise_sdist(path: Path, time: int) -> None:
    """Writes an archive again with all times set to `time`, names sorted and no owners: the same bytes each time."""
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member)) for member in archive.getmembers()]
        members = [(member, None if file is None else file.read()) for member, file in members]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in sorted(members, key=lambda pair: pair[0].name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = time, 0, 0, "", ""
            member.pax_headers = {}
            archive.addfile(member, None if data is None else io.BytesIO(data))
    path.write_bytes(gzip.compress(content.getvalue(), mtime=time))


def build(revision: str, folder: Path) -> list[Path]:
    """
    Builds wheel and sdist of a commit, from a copy of what is committed.

    Args:
        revision (`str`): The commit.
        folder (`Path`): Where they go.

    Returns:
        `list[Path]`: The wheel and the sdist.
    """
    time = int(run("git", "log", "-1", "--format=%ct", revision, cwd=ROOT))
    with tempfile.TemporaryDirectory() as source:
        archive = Path(source, "source.tar")
        run("git", "archive", "--output", archive, revision, cwd=ROOT)
        source = Path(source, "source")
        with tarfile.open(archive) as files:
            files.extractall(source, filter="data")
        project = tomllib.loads(Path(source, "pyproject.toml").read_text())["project"]
        readme = Path(source, "README.md")
        home, tag = project["urls"]["Repository"], f"v{project['version']}"
        readme.write_text(make_links_absolute(readme.read_text(), home, tag))
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-W", "ignore", "-c", BUILD]
        environment = os.environ | {"SOURCE_DATE_EPOCH": str(time)}
        printed = [run(*command, f"build_{kind}", folder, cwd=source, env=environment) for kind in ("wheel", "sdist")]
        wheel, sdist = (folder / text.split()[-1] for text in printed)
    normalise_sdist(sdist, time)
    return [wheel, sdist]


def install_and_sample(files: list[Path], folder: Path) -> None:
    """Installs each file in an environment that has nothing else, and draws an image with it, without a network."""
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "venv", folder)
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    run(*pip, "setuptools>=77", "torch", files[0])
    for path in files:
        run(*pip, "--no-deps", "--no-build-isolation", "--force-reinstall", path)
        run(python, "-c", SMOKE, cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
        run(folder / "bin" / "dod", "--version")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="Only build and install what is committed.")
    args = parser.parse_args(argv)
    if not args.dry_run and (problems := find_problems(ROOT)):
        sys.exit("\n".join(problems))
    files = build("HEAD", ROOT / "dist")
    with tempfile.TemporaryDirectory() as folder:
        again = build("HEAD", Path(folder, "again"))
        for one, two in zip(files, again, strict=True):
            if one.read_bytes() != two.read_bytes():
                sys.exit(f"Two builds must have the same bytes, got others in {one.name}.")
        install_and_sample(files, Path(folder, "environment"))
    for path in files:
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path}")
    if not args.dry_run:
        version = files[0].name.split("-")[1]
        run("git", "tag", "--annotate", f"v{version}", "--message", f"Version {version}", cwd=ROOT)
        print(f"To publish it: git push origin v{version}; python -m twine upload {' '.join(map(str, files))}")


if __name__ == "__main__":
    main()
