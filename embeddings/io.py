"""Tables in safetensors files: the same bytes from any number of ranks, readable by any other number.

A folder holds embeddings-00001-of-0000N.safetensors and embeddings.safetensors.index.json. Each shard has the rows of a
range of hash buckets; per logical table, sorted by (bucket, id): "<table>.ids" int64 [n], "<table>.rows" [n, dim] and,
with optimizer state, "<table>.<slot>" float32 [n, width], "<table>.step" int32 [n], and where rows track their use
"<table>.last_use" and "<table>.count" int32 [n]; "<table>.bucket_offsets" int64
[buckets + 1] says where each bucket begins. The index names the configs of the tables, the seed, the hash, the
optimizer and the shards. embeddings-shared.safetensors holds the rows that unknown ids share, where tables have them.
"""

from .index import FORMAT_VERSION, INDEX_NAME, read_index, remove_index, shard_files
from .loading import load_tables, whole_shards
from .mapped import map_tables
from .saving import save_tables

__all__ = [
    "FORMAT_VERSION",
    "INDEX_NAME",
    "load_tables",
    "map_tables",
    "read_index",
    "remove_index",
    "save_tables",
    "shard_files",
    "whole_shards",
]
