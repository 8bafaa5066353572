"""How many steps a run has."""

import pytest
from grzoo.recipes.arguments import TrainingArguments
from grzoo.recipes.training import total_steps


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 10), (1.1, 11), (1.11, 12), (0.05, 1)], ids=["whole", "inexact", "up", "least"]
)
def test_epochs_are_rounded_up_to_steps(epochs, steps):
    assert total_steps(TrainingArguments(num_train_epochs=epochs), 10) == steps
