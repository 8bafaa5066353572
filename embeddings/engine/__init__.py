"""DeepSpeed and the sparse side as one engine. Importing this package does not import DeepSpeed; `initialize` does."""

from .engine import GenRecEngine, StepOutput
from .initialize import initialize

__all__ = ["GenRecEngine", "StepOutput", "initialize"]
