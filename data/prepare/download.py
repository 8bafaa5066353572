"""Official downloads, checked and kept in a cache."""

import os
from pathlib import Path

import pooch

# GroupLens publishes the md5 of its stable archives; ml-latest-small changes over time and has none, nor has Amazon.
GROUPLENS = "https://files.grouplens.org/datasets/movielens"
CHECKSUMS = {
    "ml-100k": "md5:0e33842e24a9c977be4e0107933c0723",
    "ml-1m": "md5:c4d9eecfca2ab87c1945afe126590906",
    "ml-20m": "md5:cd245b17a1ae2cc31bb14903e1204af3",
}
AMAZON = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles"


def cache_folder() -> Path:
    """Where downloads are kept: $GRZOO_CACHE/downloads or ~/.cache/grzoo/downloads."""
    return Path(os.environ.get("GRZOO_CACHE") or Path.home() / ".cache" / "grzoo") / "downloads"


def fetch(url: str, known_hash: str | None) -> Path:
    """The file behind `url`, downloaded once and compared with `known_hash` ("md5:..."; None: unchecked).

    ValueError when it cannot be had or differs, with the remedy.
    """
    try:
        path = pooch.retrieve(
            url, known_hash=known_hash, path=cache_folder(), fname=url.rsplit("/", 1)[-1], progressbar=False
        )
    except ValueError as error:
        raise ValueError(f"{url} does not have its published checksum {known_hash}: download it again") from error
    except Exception as error:
        raise ValueError(
            f"{url} cannot be downloaded ({error}): download it elsewhere and pass --source PATH"
        ) from error
    return Path(path)


def movielens(name: str) -> Path:
    """The unpacked folder of a MovieLens archive."""
    return unpack(fetch(f"{GROUPLENS}/{name}.zip", CHECKSUMS.get(name)), name)


def unpack(archive: Path, name: str) -> Path:
    """The folder `name` of a zip archive, unpacked beside it."""
    pooch.Unzip(extract_dir=f"{archive.stem}.unpacked")(str(archive), "download", None)
    return archive.parent / f"{archive.stem}.unpacked" / name


def amazon(category: str) -> Path:
    """The file of the 5-core reviews of a category (2014)."""
    return fetch(f"{AMAZON}/reviews_{category}_5.json.gz", None)
