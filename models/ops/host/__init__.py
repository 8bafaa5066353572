"""C++ paths of the model ops on a CPU, compiled on first use; the ops' own folders hold their sources."""

from .attention_call import AttentionCall, View, check_host_tensor
from .library import HIGHEST_LEVEL, available, library

__all__ = ["HIGHEST_LEVEL", "AttentionCall", "View", "available", "check_host_tensor", "library"]
