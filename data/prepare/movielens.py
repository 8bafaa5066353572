"""MovieLens in its raw forms.

- `ratings.dat`: user::item::rating::timestamp, with movies.dat (latin-1); ml-1m
- `u.data`: the same, tab-separated, with u.item; ml-100k
- `ratings.csv`: userId,movieId,rating,timestamp, with movies.csv; ml-20m, ml-latest-small
- `*.inter`: tab-separated with a typed header (user_id:token ...), with *.item; RecBole's atomic files
- `*_seq_ts.parquet`: sas_user, sas_item, rating, ts_filled; the next file with times
- `ml-1m.txt`: "user item" lines in chronological order, numbered from 1, with sas_to_original_items.txt and movies.dat
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import download
from .config import PrepareConfig
from .log import EventLog
from .ranking import age_group
from .readers import column, existing, genres, numbers, read_delimited, read_integer_lines, seconds

OPTIONS = frozenset({"source"})
NAMES = ("ml-100k", "ml-1m", "ml-20m", "ml-latest-small")
# Of whole files; ml-1m.txt has the items of at least five ratings. ml-latest-small changes.
_RATINGS = {"ml-100k": (100_000,), "ml-1m": (1_000_209, 999_611), "ml-20m": (20_000_263,)}

_RATING_TYPES = {"user": pa.int64(), "item": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()}
_Reader = Callable[[Path], EventLog]


def read(config: PrepareConfig) -> EventLog:
    """The log of a MovieLens data set, from `source` (a file, or a folder in which the form is found) or downloaded."""
    source = existing(config.source) if config.source else download.movielens(config.name)
    path, reader = _find(source, config.name)
    log = reader(path)
    log.user_metadata = _profiles(path)
    if not config.source and config.name not in download.CHECKSUMS:
        log.notes += (f"{config.name} changes over time and has no published checksum: the download is unchecked",)
    if len(log.users) not in _RATINGS.get(config.name, (len(log.users),)):
        whole = " or ".join(f"{count:,}" for count in _RATINGS[config.name])
        log.notes += (
            f"{path.name} has {len(log.users):,} ratings, {config.name} has {whole}: a part, or another log?",
        )
    return log


def _find(source: Path, name: str) -> tuple[Path, _Reader]:
    """The file to read and its reader; forms with times come first."""
    forms: tuple[tuple[str, _Reader], ...] = (
        ("ratings.dat", _ratings_dat),
        ("u.data", _u_data),
        ("ratings.csv", _ratings_csv),
        ("*.inter", _inter),
        ("*_seq_ts.parquet", _seq_parquet),
        (f"{name}.txt", _user_item_text),
    )
    if source.is_dir():
        for pattern, reader in forms:
            found = sorted(source.glob(pattern))
            if found:
                return found[0], reader
        wanted = ", ".join(pattern for pattern, _ in forms)
        raise FileNotFoundError(f"{source} holds none of {wanted}: give the folder or file of the raw {name} data")
    for pattern, reader in (*forms, ("*.dat", _ratings_dat), ("*.data", _u_data), ("*.csv", _ratings_csv)):
        if source.match(pattern):
            return source, reader
    return source, _seq_parquet if source.suffix == ".parquet" else _user_item_text


def _log(table: pa.Table, path: Path, metadata: pa.Table | None, notes: tuple[str, ...] = ()) -> EventLog:
    """The log of a table with the columns user, item, timestamp and perhaps rating."""
    rated = "rating" in table.column_names
    return EventLog(
        users=table["user"],
        items=table["item"],
        timestamps=seconds(table["timestamp"], "s", path),
        features={"rating": numbers(table["rating"], "rating", path).astype(np.float32)} if rated else {},
        item_metadata=metadata,
        source=str(path),
        notes=notes,
    )


def _ratings_dat(path: Path) -> EventLog:
    table = read_delimited(path, "::", list(_RATING_TYPES), _RATING_TYPES)
    return _log(table, path, _movies_dat(path.with_name("movies.dat")))


def _u_data(path: Path) -> EventLog:
    table = read_delimited(path, "\t", list(_RATING_TYPES), _RATING_TYPES)
    return _log(table, path, _u_item(path.with_name("u.item")))


def _ratings_csv(path: Path) -> EventLog:
    types = {"userId": pa.int64(), "movieId": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()}
    table = read_delimited(path, ",", types=types)
    for name in types:
        column(table, name, path)
    table = table.select(list(types)).rename_columns(list(_RATING_TYPES))
    return _log(table, path, _movies_csv(path.with_name("movies.csv")))


def _inter(path: Path) -> EventLog:
    table = _typed(path)
    for name in ("user_id", "item_id", "timestamp"):
        column(table, name, path)
    table = table.rename_columns(
        [{"user_id": "user", "item_id": "item"}.get(name, name) for name in table.column_names]
    )
    return _log(table, path, _atomic_items(path.with_suffix(".item")))


def _seq_parquet(path: Path) -> EventLog:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    for name in ("sas_user", "sas_item", "ts_filled"):
        column(table, name, path)
    renamed = {"sas_user": "user", "sas_item": "item", "ts_filled": "timestamp"}
    table = table.rename_columns([renamed.get(name, name) for name in table.column_names])
    notes: tuple[str, ...] = ()
    if "kind" in table.column_names:
        exact = pc.mean(pc.equal(table["kind"], "exact")).as_py()
        notes = (f"{exact:.0%} of the timestamps are true, the others are interpolated between true bounds",)
    if "rating" in table.column_names and table["rating"].null_count:
        notes += (f"{table['rating'].null_count / len(table):.0%} of the ratings are unknown (NaN)",)
    return _log(table, path, _joined_titles(path.parent), notes)


def _user_item_text(path: Path) -> EventLog:
    values, counts = read_integer_lines(path, fields=2)
    pairs = values.reshape(len(counts), 2)
    return EventLog(
        users=pa.array(pairs[:, 0]),
        items=pa.array(pairs[:, 1]),
        item_metadata=_joined_titles(path.parent),
        source=str(path),
        notes=("the file has no timestamps: its order is the time",),
    )


def _movies_dat(path: Path) -> pa.Table | None:
    if not path.is_file():
        return None
    types = {"item_id": pa.int64(), "title": pa.string(), "genres": pa.string()}
    table = read_delimited(path, "::", list(types), types, encoding="latin-1")
    return table.set_column(2, "genres", genres(table["genres"], "|"))


def _movies_csv(path: Path) -> pa.Table | None:
    if not path.is_file():
        return None
    table = read_delimited(path, ",", types={"movieId": pa.int64(), "title": pa.string(), "genres": pa.string()})
    return pa.table(
        {
            "item_id": column(table, "movieId", path),
            "title": column(table, "title", path),
            "genres": genres(column(table, "genres", path), "|"),
        }
    )


def _u_item(path: Path) -> pa.Table | None:
    if not path.is_file():
        return None
    names = [f"f{i}" for i in range(24)]
    table = read_delimited(path, "|", names, dict.fromkeys(names, pa.string()), encoding="latin-1")
    return pa.table({"item_id": table["f0"].cast(pa.int64()), "title": table["f1"]})


def _atomic_items(path: Path) -> pa.Table | None:
    if not path.is_file():
        return None
    table = _typed(path)
    known = {"item_id": "item_id", "movie_title": "title", "release_year": "year", "class": "genres"}
    table = table.rename_columns([known.get(name, name) for name in table.column_names])
    if "genres" in table.column_names:
        at = table.column_names.index("genres")
        table = table.set_column(at, "genres", genres(table["genres"], " "))
    return table


def _typed(path: Path) -> pa.Table:
    """Tab-separated text whose header gives `name:type` with the types token, token_seq, float and float_seq."""
    table = read_delimited(path, "\t")
    return table.rename_columns([name.partition(":")[0] for name in table.column_names])


def _profiles(path: Path) -> pa.Table | None:
    """Profiles of the users beside a file of ratings: age group, gender, occupation, first digit of the zip code."""
    folder = path.parent
    atomic, dat, u_user = path.with_suffix(".user"), folder / "users.dat", folder / "u.user"
    renumbered = folder / "sas_to_original_users.txt"
    if path.suffix == ".inter" and atomic.is_file():
        names = {"user_id": "user_id", "age": "age", "gender": "gender", "occupation": "occupation", "zip_code": "zip"}
        table = _typed(atomic)
        table = table.select([name for name in names if name in table.column_names])
        table = table.rename_columns([names[name] for name in table.column_names])
    elif path.name == "u.data" and u_user.is_file():
        table = read_delimited(u_user, "|", ["user_id", "age", "gender", "occupation", "zip"])
    elif dat.is_file() and (path.name == "ratings.dat" or renumbered.is_file()):
        table = read_delimited(dat, "::", ["user_id", "gender", "age", "occupation", "zip"])
        if path.name != "ratings.dat":
            values, counts = read_integer_lines(renumbered, fields=2)
            pairs = values.reshape(len(counts), 2)
            rows = pc.index_in(pa.array(pairs[:, 1]), value_set=table["user_id"].combine_chunks().cast(pa.int64()))
            table = table.take(rows).set_column(0, "user_id", pa.array(pairs[:, 0]))
    else:
        return None
    if "age" in table.column_names:
        ages = table["age"].cast(pa.int64()).to_numpy()
        table = table.set_column(table.column_names.index("age"), "age", pa.array(age_group(ages)))
    if "zip" in table.column_names:
        at = table.column_names.index("zip")
        table = table.set_column(at, "zip", pc.utf8_slice_codeunits(table["zip"].cast(pa.string()), 0, 1))
    return table


def _joined_titles(folder: Path) -> pa.Table | None:
    """movies.dat under the renumbered item ids of the `user item` file, when both files are beside it."""
    movies = _movies_dat(folder / "movies.dat")
    mapping = folder / "sas_to_original_items.txt"
    if movies is None or not mapping.is_file():
        return None
    values, counts = read_integer_lines(mapping, fields=2)
    pairs = values.reshape(len(counts), 2)
    rows = pc.index_in(pa.array(pairs[:, 1]), value_set=movies["item_id"].combine_chunks())
    table = pa.table({"item_id": pa.array(pairs[:, 0]), "movie_id": pa.array(pairs[:, 1])})
    for name in ("title", "genres"):
        table = table.append_column(name, movies[name].take(rows))
    return table
