"""Where `initialize` finds tables that cannot be trained from here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from grzoo.embeddings.engine.initialize import _check_device


class Table:
    """A physical table with rows, or none, on a device."""

    def __init__(self, device: str, rows: int) -> None:
        self.device, self.rows, self.configs = torch.device(device), rows, [SimpleNamespace(name="items")]

    def __len__(self) -> int:
        return self.rows


def collection(*tables: Table) -> Any:
    return SimpleNamespace(physical=list(tables))


def test_rows_that_all_ranks_put_on_the_first_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tables \['items'\] are on cuda:0 and .* cuda:3: .*set_device"):
        _check_device(collection(Table("cpu", 5), Table("cuda:0", 2)), torch.device("cuda", 3))


def test_rows_on_this_gpu_in_host_memory_and_tables_without_rows_are_fine() -> None:
    tables = collection(Table("cpu", 5), Table("cuda:3", 2), Table("cuda:0", 0))
    _check_device(tables, torch.device("cuda", 3))
    _check_device(collection(Table("cpu", 5)), torch.device("cpu"))
