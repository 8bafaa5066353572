"""recipes/train.py, which also writes the exact loss of every step into $GRZOO_LOSSES: one line "step loss" each."""

import os
from typing import Any

from grzoo.embeddings.engine import GenRecEngine
from grzoo.recipes.runtime import run
from grzoo.recipes.train import main

_train_batch = GenRecEngine.train_batch


def train_batch(engine: GenRecEngine, step: Any) -> Any:
    output = _train_batch(engine, step)
    if engine.exchange.rank == 0:
        with open(os.environ["GRZOO_LOSSES"], "a") as file:
            file.write(f"{engine.global_steps} {output.loss.hex()}\n")
    return output


if __name__ == "__main__":
    GenRecEngine.train_batch = train_batch  # type: ignore[method-assign]
    run(main)
