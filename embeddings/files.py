"""Files that other users may read."""

import os
from pathlib import Path


def obey_umask(file: Path) -> None:
    """Give a file the permissions that the process's umask asks for; safetensors makes files for their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
