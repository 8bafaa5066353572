"""Initial laws of the logical tables of a physical one, as tensors that kernels read."""

from collections.abc import Sequence

import torch
from grzoo.embeddings.kernels.base import RowInit
from torch import Tensor

_KINDS = {"uniform": -1, "constant": -2}


class Laws:
    """Arguments `laws`, `factors`, `quantiles` of the kernels with initial values (row_kernels.initial_tile)."""

    def __init__(self, inits: Sequence[RowInit], device: torch.device) -> None:
        tables: list[Tensor] = []  # each table of quantiles once
        words: list[tuple[int, int]] = []
        for init in inits:
            if init.kind not in (*_KINDS, "quantile"):
                raise ValueError(f"unknown initial law {init.kind!r}: use 'uniform', 'quantile' or 'constant'")
            words.append((_KINDS.get(init.kind, 0), init.key))
            if init.kind == "quantile":
                assert init.quantiles is not None
                known = [k for k, table in enumerate(tables) if table is init.quantiles]
                words[-1] = (known[0] if known else len(tables), init.key)
                if not known:
                    tables.append(init.quantiles)
        factors = [init.scale * 2.0**-23 if init.kind == "uniform" else init.scale for init in inits]
        self.laws = torch.tensor(words, dtype=torch.int64, device="cpu").to(device)
        self.factors = torch.tensor(factors, dtype=torch.float32, device="cpu").to(device)
        self.quantiles = torch.stack(tables or [torch.zeros(1, device="cpu")]).to(device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.laws, self.factors, self.quantiles
