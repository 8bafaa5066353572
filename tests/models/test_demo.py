"""Law: the model in the package is small, free to use, and says how it was made."""

import re

from grzoo import demo_checkpoint


def test_the_demo_has_a_card_and_is_small() -> None:
    folder = demo_checkpoint()
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "train.py --config hstu_synthetic" in card
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|usr|Users)\b", card)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1 << 20
