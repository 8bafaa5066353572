"""Recommendations for one history, with names, as JSON values and as a printed table."""

import warnings
from pathlib import Path
from typing import Any

import torch
from grzoo.data import EventDataset, GenRecProcessor

from .runtime import UserError


def recommend(
    model: Any,
    processor: GenRecProcessor,
    history: list[Any],
    *,
    timestamps: list[int] | None = None,
    request_timestamp: int | None = None,
    top_k: int = 10,
) -> dict[str, Any]:
    """The best items of the catalogue after a history. Collective when the model's tables are sharded.

    Args:
        history: original item ids, the oldest first.
        timestamps: seconds, one per event; a model with a time bias takes all events as simultaneous without them.
        request_timestamp: when the user asks; default: the time of the last event.
        top_k: how many.

    Returns:
        {"history", "timestamps", "request_timestamp", "recommendations": [{"rank", "item_id", "title", "score"}]}.

    Raises:
        UserError: an empty history. ValueError: unknown items, timestamps of another number.
    """
    if not history:
        raise UserError("the history is empty: give at least one item")
    times: dict[str, Any] = {}
    if not getattr(model.config, "use_time_bias", False):
        if timestamps:
            warnings.warn("timestamps have no effect on this model: it has no time bias", stacklevel=2)
    else:
        if not timestamps:
            warnings.warn("no timestamps given: the model takes all events as simultaneous", stacklevel=2)
        times["timestamps"] = [timestamps or [0] * len(history)]
        if timestamps and request_timestamp is not None:
            times["request_timestamps"] = [request_timestamp]
    device = next(model.parameters()).device
    catalogue = processor.catalogue
    inputs = {name: value.to(device) for name, value in processor([history], **times).items()}
    candidates = torch.from_numpy(catalogue.ids).to(device)
    output = model.recommend(**inputs, top_k=min(top_k, len(catalogue)), candidates=candidates)
    shown = output.scores[0] > -torch.inf
    items, scores = output.item_ids[0][shown].cpu(), output.scores[0][shown].tolist()
    rows = zip(processor.decode(items), processor.titles(items), scores, strict=True)
    return {
        "history": history,
        "timestamps": timestamps,
        "request_timestamp": request_timestamp,
        "recommendations": [
            {"rank": rank, "item_id": item, "title": title, "score": round(score, 6)}
            for rank, (item, title, score) in enumerate(rows, start=1)
        ],
    }


def recommend_to_row(model: Any, folder: Path, *, row: int, top_k: int) -> dict[str, Any]:
    """`recommend` for a user of the test split, before the last event; with the original "user" id beside it.

    Args:
        folder: dataset folder.
        row: number of the user in the test split.
    """
    dataset = EventDataset.from_folder(folder, "test")
    if not 0 <= row < len(dataset):
        raise UserError(f"user row {row} is not in the test split: it has rows 0 to {len(dataset) - 1}")
    processor = GenRecProcessor.from_dataset(folder)
    events = dataset.rows([row])
    history = processor.decode(events["item_id"][:-1])
    uses_times = dataset.has_timestamps and getattr(model.config, "use_time_bias", False)
    times = events["timestamp"].tolist() if uses_times else None
    found = recommend(
        model,
        processor,
        history,
        timestamps=times[:-1] if times else None,
        request_timestamp=times[-1] if times else None,
        top_k=top_k,
    )
    return {"user": dataset.user_ids()[row].as_py(), **found}


def table(result: dict[str, Any]) -> str:
    """Text table of what `recommend` returned: rank, item, score, title."""
    rows = [f"{'rank':>4}  {'item':>12}  {'score':>7}  title"]
    for entry in result["recommendations"]:
        rows.append(f"{entry['rank']:>4}  {entry['item_id']!s:>12}  {entry['score']:7.4f}  {entry['title']}")
    return "\n".join(rows)


def differences(result: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> str:
    """What differs between two lists of recommendations: items, titles and order exactly, scores to `tolerance`."""
    ours, theirs = result["recommendations"], expected["recommendations"]
    if [(e["item_id"], e["title"]) for e in ours] != [(e["item_id"], e["title"]) for e in theirs]:
        return f"expected the items {[e['item_id'] for e in theirs]}, got {[e['item_id'] for e in ours]}"
    gap = max((abs(a["score"] - b["score"]) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    return f"scores differ by {gap:g}" if gap > tolerance else ""
