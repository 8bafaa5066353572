"""A small trained model that comes with the package, to try grzoo without training or downloading anything."""

from pathlib import Path


def demo_checkpoint() -> Path:
    """Folder of an HSTU of 12,000 dense parameters, trained on the generated log of 987 items (`make demo-checkpoint`).

    Example:
        model = AutoModelForRetrieval.from_pretrained(demo_checkpoint())
    """
    return Path(__file__).parent / "export"
