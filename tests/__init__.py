"""Tests of the layers, the data and the notebooks, and the commands that keep the notebooks honest."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"


def committed() -> list[Path]:
    """Return the notebooks of this repository in reading order."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def snapshot(folder: Path, data: bool = False) -> Path:
    """Copy the tree without .git, caches and MNIST to `folder`, which must not exist; `data` links MNIST in."""
    skip = shutil.ignore_patterns(
        ".git", "__pycache__", ".*_cache", ".ipynb_checkpoints", ".venv", "MNIST", "*.egg-info"
    )
    shutil.copytree(ROOT, folder, ignore=skip)
    if data and (ROOT / "data" / "MNIST").is_dir():
        (folder / "data" / "MNIST").symlink_to(ROOT / "data" / "MNIST")
    return folder
