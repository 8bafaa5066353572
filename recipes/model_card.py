"""The README.md of an exported model, with the metadata that the Hugging Face hub reads."""

from typing import Any

from grzoo.models.ranking import RankingConfig
from huggingface_hub import EvalResult, ModelCardData

from .dataset_folder import LoadedData
from .loading import auto_class
from .provenance import versions
from .report import metrics_table

_TEMPLATE = """---
{metadata}
---

# {name}

{kind} for {task}, trained on {dataset} with dynamic embedding tables by grzoo.

```python
from grzoo import {auto_class}, GenRecProcessor

model = {auto_class}.from_pretrained("{name}")
processor = GenRecProcessor.from_pretrained("{name}")
```

## Results

{split} split, {protocol}; the baseline prefers the items with the most training events.

```
{table}
```

## How it was trained

```
{command}
```

{conditions}
"""


def model_card(
    model: Any,
    data: LoadedData,
    *,
    metrics: dict[str, float],
    baseline: dict[str, float],
    conditions: dict[str, str],
    command: str,
    split: str = "test",
    license: str | None = None,
) -> str:
    """Markdown with YAML metadata: results, data, command and conditions of one run."""
    ranks = isinstance(model.config, RankingConfig)
    name = f"{model.config.model_type}-{data.schema.name}"
    results = [
        EvalResult(
            task_type="recommendation",
            dataset_type=data.schema.name,
            dataset_name=data.schema.name,
            metric_type=metric,
            metric_value=round(value, 5),
        )
        for metric, value in metrics.items()
    ]
    metadata = ModelCardData(
        library_name="grzoo",
        license=license,
        tags=["generative-recommendation", model.config.model_type],
        model_name=name,
        eval_results=results,
    )
    return _TEMPLATE.format(
        metadata=metadata.to_yaml(),
        name=name,
        kind=type(model).__name__,
        dataset=data.schema.name,
        split=split.capitalize(),
        task="ranking" if ranks else "retrieval",
        auto_class=auto_class(type(model.config)).__name__,
        protocol="every exposure once" if ranks else f"full ranking of {len(data.catalogue):,} items",
        table=metrics_table(metrics, baseline),
        command=command,
        conditions="\n".join(f"- {key}: {value}" for key, value in {**conditions, **versions()}.items()),
    )
