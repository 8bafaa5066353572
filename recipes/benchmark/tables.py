"""Makes the tables of results in the READMEs from the CSVs beside it; a test holds that they are what this makes.

    python -m grzoo.recipes.benchmark.tables            # in the repository: rewrites what stands between the markers

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`. Runs that differ in nothing but the seed
are one line: mean and sample standard deviation.
"""

import argparse
import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import yaml

from .record import loss_of

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")
CONFIGS = Path(__file__).parents[1] / "configs"
Row = dict[str, str]
Block = Callable[[], str]

_SAME_RUN = ("model", "dataset", "protocol", "exclude_seen", "loss", "epochs", "recipe", "changes")
_SEEN = {"true": "left out", "false": "kept in", "": "not known"}
_STAGES = {"untuned": "no", "final": "yes"}
_MODELS = {"hstu": "HSTU", "sasrec": "SASRec", "mtgr": "MTGR", "dlrm": "DLRM-style MLP", "dlrm_hstu": "DLRM-HSTU"}
_DATASETS = {
    "ml-1m": "MovieLens-1M",
    "ml-100k": "MovieLens-100K",
    "ml-latest-small": "MovieLens latest-small",
    "amazon-beauty": "Amazon 2014 Beauty",
    "amazon-sports": "Amazon 2014 Sports and Outdoors",
}


def blocks() -> dict[Path, dict[str, Block]]:
    """README -> name of a block -> what makes its text."""
    models = ROOT / "models"
    return {
        ROOT / "README.md": {"retrieval": retrieval_summary, "ranking": ranking_summary},
        models / "hstu" / "README.md": {"hstu": lambda: retrieval_details("hstu")},
        models / "sasrec" / "README.md": {"sasrec": lambda: retrieval_details("sasrec")},
        models / "mtgr" / "README.md": {"ranking": ranking_details},
    }


def fill(text: str, made: dict[str, Block]) -> str:
    """`text` with each block replaced by what its function makes.

    Raises:
        ValueError: the text has no such block.
    """
    for name, make in made.items():
        pattern = re.compile(rf"(<!-- results: {re.escape(name)} -->\n).*?(<!-- end of results -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"no block <!-- results: {name} --> ... <!-- end of results -->")
        content = make()
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)  # type: ignore[misc]
    return text


def read(name: str) -> list[Row]:
    """The rows of results/NAME.csv."""
    with open(RESULTS / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def seeds_together(rows: Sequence[Row], keys: Sequence[str]) -> list[list[Row]]:
    """Rows that agree in `keys`, in the order of their first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


def spread(group: Sequence[Row], column: str, digits: int = 4) -> str:
    """ "mean ± standard deviation" of a column, one number for one row, nothing where a row has none."""
    texts = [row[column] for row in group]
    if not all(texts):
        return ""
    values = [float(text) for text in texts]
    parts = [mean(values)] if len(values) == 1 else [mean(values), stdev(values)]
    return " ± ".join(f"{value:.{digits}f}".removeprefix("0") for value in parts)


def retrieval_summary() -> str:
    """One line for each recipe: its unchanged run of the most seeds, or an empty one."""
    groups = seeds_together(read("retrieval"), _SAME_RUN)
    header = ("model", "data set", "loss", "epochs", "seeds", "NDCG@10", "HR@10", "published", "popularity", "recipe")
    lines = []
    for path in _recipes():
        of_recipe = [group for group in groups if group[0]["recipe"] == path.name]
        for kept in ("true", "false"):
            found = [group for group in of_recipe if group[0]["exclude_seen"] == kept]
            if found:
                lines.append(_summary_line(max(found, key=_preference), path.name))
        if not of_recipe:
            lines.append(_empty_line(path))
    return _table(header, lines)


def _recipes() -> list[Path]:
    """Recipes of retrieval models on public data."""
    order = list(_DATASETS)
    paths = [path for name in ("hstu", "sasrec") for path in CONFIGS.glob(f"{name}_*.yaml")]
    known = [path for path in paths if yaml.safe_load(path.read_text())["dataset"] in order]
    return sorted(known, key=lambda path: (path.stem.split("_")[0], order.index(_dataset_of(path))))


def _dataset_of(path: Path) -> str:
    return str(yaml.safe_load(path.read_text())["dataset"])


def _preference(group: Sequence[Row]) -> tuple[bool, int, float]:
    return not group[0]["changes"], len(group), float(group[0]["epochs"])


def _summary_line(group: Sequence[Row], recipe: str) -> list[str]:
    first = group[0]
    seen = "" if first["exclude_seen"] == "true" else ", seen items kept in"
    changed = f", {first['changes']}" if first["changes"] else ""
    return [
        f"[{_MODELS[first['model']]}](models/{first['model']}/README.md)",
        _DATASETS[first["dataset"]] + seen,
        first["loss"],
        first["epochs"],
        str(len(group)),
        spread(group, "ndcg@10"),
        spread(group, "hr@10"),
        _best_published(first),
        spread(group[:1], "popularity_ndcg@10"),
        f"[`{recipe}`](recipes/configs/{recipe}){changed}",
    ]


def _empty_line(path: Path) -> list[str]:
    recipe = yaml.safe_load(path.read_text())
    model, dataset = recipe["model"]["model_type"], recipe["dataset"]
    loss = loss_of({**recipe["model"], **{key: recipe.get(key) for key in ("negative_sampling", "num_negatives")}})
    row = {"model": model, "dataset": dataset, "loss": loss, "exclude_seen": str(recipe["exclude_seen"]).lower()}
    link = f"[`{path.name}`](recipes/configs/{path.name})"
    name = f"[{_MODELS[model]}](models/{model}/README.md)"
    return [name, _DATASETS[dataset], loss, "", "", "", "", _best_published(row), "", link]


def published(row: Row) -> list[Row]:
    """Published rows of the same model, data and filter; of the same loss, where they say theirs."""
    same = ("model", "dataset", "exclude_seen")
    return [
        other
        for other in read("published")
        if all(other[key] == row[key] for key in same) and row["loss"].startswith(other["loss"])
    ]


def _best_published(row: Row) -> str:
    best = max(published(row), key=lambda other: float(other["ndcg@10"]), default=None)
    return f"{best['ndcg@10']}, {best['hr@10']}" if best else ""


def retrieval_details(model: str) -> str:
    """All runs of a model, and the published rows of it and of models that the zoo does not have."""
    rows = [row for row in read("retrieval") if row["model"] == model]
    metrics = ("hr@10", "ndcg@10", "mrr", "hr@50", "hr@200", "ndcg@200")
    names = [name.replace("hr", "HR").replace("ndcg", "NDCG").replace("mrr", "MRR") for name in metrics]
    header = ("data set", "loss", "epochs", "seen items", "seeds", *names, "minutes", "recipe")
    lines = []
    for group in sorted(seeds_together(rows, _SAME_RUN), key=lambda group: list(_DATASETS).index(group[0]["dataset"])):
        first = group[0]
        changed = f", {first['changes']}" if first["changes"] else ""
        times = [float(row["seconds"]) / 60 for row in group if row["seconds"]]
        lines.append(
            [
                _DATASETS[first["dataset"]],
                first["loss"],
                first["epochs"] + _best_epochs(group),
                _SEEN[first["exclude_seen"]],
                ", ".join(sorted(row["seed"] for row in group)),
                *(spread(group, name) for name in metrics),
                f"{mean(times):.0f}" if times else "",
                f"`{first['recipe']}`{changed}",
            ]
        )
    for row in (row for row in read("published") if row["model"] == model or row["model"] not in _MODELS):
        source = f"published: {row['source']}" + (f", {row['remark']}" if row["remark"] else "")
        shown = [row[name] if name in row else "" for name in metrics]
        lines.append([_DATASETS[row["dataset"]], row["loss"], "", _SEEN[row["exclude_seen"]], "", *shown, "", source])
    return _table(header, lines)


def _best_epochs(group: Sequence[Row]) -> str:
    best = [row["best_epoch"] for row in group if row["best_epoch"]]
    return f" (best: {', '.join(best)})" if best else ""


def ranking_summary() -> str:
    """The compared ranking models, without the ablations; tuned ones where there are."""
    header = ("model", "data set", "seeds", "tuned", "AUC", "GAUC", "log loss", "NE")
    best = {(group[0]["dataset"], group[0]["variant"]): group for group in _ranking_runs()}  # later stages win
    lines = [
        [
            f"[{_MODELS[variant]}](models/{variant}/README.md)",
            _DATASETS[dataset],
            str(len(group)),
            _STAGES[group[0]["stage"]],
            *(spread(group, name) for name in ("auc", "gauc", "logloss", "ne")),
        ]
        for (dataset, variant), group in best.items()
        if variant in _MODELS
    ]
    return _table(header, lines)


def ranking_details() -> str:
    """All variants, with what was chosen for them."""
    metrics = ("auc", "gauc", "logloss", "ne", "love_auc", "love_gauc")
    names = ("AUC", "GAUC", "log loss", "NE", "love: AUC", "love: GAUC")
    chosen = ("tuned", "learning rate", "dropout", "best epochs", "dense parameters", "minutes")
    lines = []
    for group in _ranking_runs():
        first = group[0]
        best = ", ".join(row["best_epoch"] for row in group)
        seeds = ", ".join(sorted(row["seed"] for row in group))
        minutes = mean(float(row["seconds"] or row["cpu_seconds"]) for row in group) / 60
        size = f"{int(first['dense_parameters']):,}"
        sizes = [first["learning_rate"], first["dropout"], best, size, f"{minutes:.1f}"]
        shown = [spread(group, name) for name in metrics]
        tuned = _STAGES[first["stage"]]
        lines.append([_DATASETS[first["dataset"]], first["variant"], seeds, *shown, tuned, *sizes])
    return _table(("data set", "variant", "seeds", *names, *chosen), lines)


def _ranking_runs() -> list[list[Row]]:
    rows = [row for row in read("ranking") if row["stage"] in _STAGES]
    return seeds_together(rows, ("stage", "dataset", "variant", "learning_rate", "dropout", "max_epochs"))


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, made in blocks().items():
        path.write_text(fill(path.read_text(), made))
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
