"""C++ paths of the model ops on a CPU, compiled on first use; the ops' own folders hold their sources."""

from .library import HIGHEST_LEVEL, available, library

__all__ = ["HIGHEST_LEVEL", "available", "library"]
