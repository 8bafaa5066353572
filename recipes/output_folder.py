"""Folders that a recipe writes into: never over another run, a checkpoint, or what is not its own."""

import os
from pathlib import Path

from .loading import is_checkpoint
from .runtime import UserError


def check_run_folder(output_dir: Path, dataset_dir: Path | None, *, resumes: bool) -> None:
    """Raises UserError where a run would write into a file, its dataset folder or the folder of another run."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: choose a folder")
    if dataset_dir is not None and output_dir.resolve() == dataset_dir.resolve():
        raise UserError(f"--output_dir and --dataset_dir are both {output_dir}: a run needs a folder of its own")
    if resumes or not output_dir.is_dir():
        return
    if (output_dir / "metrics.jsonl").exists() or any(output_dir.glob("checkpoint-*")):
        raise UserError(
            f"--output_dir {output_dir} holds a training run: go on with it by --resume_from_checkpoint last, choose "
            "another folder, or remove it"
        )


def make_run_folder(output_dir: Path) -> str:
    """Makes the folder, before anything that takes long. Raises UserError where that fails."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be made ({error}): choose another folder") from error
    if not os.access(output_dir, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {output_dir} cannot be written: choose another folder")
    return str(output_dir)


def check_export_folder(folder: Path) -> None:
    """Raises UserError where an export would write into a file, a checkpoint or a folder that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: choose a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if is_checkpoint(folder) or (folder / "state.json").exists():
        raise UserError(f"--output_dir {folder} is a checkpoint, which an export would destroy: choose another folder")
    if not (folder / "config.json").is_file() or not (folder / "embeddings.safetensors.index.json").is_file():
        raise UserError(f"--output_dir {folder} is not empty and no earlier export: choose another folder")
