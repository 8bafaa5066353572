"""Which checkpoints stay on the disk, and how the others go."""

import re
import shutil
from pathlib import Path

from . import folder as folders

_LEFTOVER = re.compile(r"checkpoint-\d+(?:\.replaced)?\.(incomplete|replaced|deleted)")
_STEP = re.compile(r"checkpoint-(\d+)")


def rotate(newest: Path, limit: int, keep: Path | None = None) -> None:
    """Keeps `limit` checkpoints (0: all): `newest`, which was just written, and the latest complete ones before it.

    `keep`, if it is complete, is one of them, whatever the limit. Damaged ones before `newest` go, whatever their step.
    Those of later steps, which a resumed run has not reached again, are left alone. Not while another program saves
    into the same folder.
    """
    save_dir = newest.parent
    delete_leftovers(save_dir)
    older = [path for path in folders.candidates(save_dir) if _step(path) < _step(newest)]
    complete = [path for path in older if folders.is_sealed(path)]
    kept = [path for path in complete if keep is not None and path.resolve() == keep.resolve()]
    kept += [path for path in complete if path not in kept][: max(0, limit - 1 - len(kept))]
    for path in older if limit > 0 else ():
        if path not in kept:
            delete(path)


def delete(folder: Path) -> None:
    """Removes a checkpoint; killed in between, what is left of it has a name that no loader looks at."""
    deleted = folder.with_name(folder.name + ".deleted")
    if deleted.exists():
        shutil.rmtree(deleted)
    folder.rename(deleted)
    folders.flush(folder.parent)
    shutil.rmtree(deleted)


def delete_leftovers(save_dir: Path) -> None:
    """Removes what saves and deletions that were killed have left."""
    for path in list(save_dir.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        if match[1] != "replaced" or folders.is_sealed(path.with_suffix("")):
            shutil.rmtree(path)


def _step(path: Path) -> int:
    match = _STEP.match(path.name)
    assert match is not None
    return int(match[1])
