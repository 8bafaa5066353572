"""Events that a log holds more than once: often an artefact of how it was made."""

import numpy as np
from grzoo.data.jagged import cut_rows

from .log import GroupedLog

_CHUNK = 1 << 22  # events that are looked at together: the columns may be larger than memory


def count_duplicates(grouped: GroupedLog) -> int:
    """Events with the user, item and time of another one, each but the first; 0 for a log without times."""
    if "timestamp" not in grouped.columns:
        return 0
    found = 0
    for first, last in cut_rows(grouped.lengths, _CHUNK):
        offsets = grouped.offsets[first : last + 1]
        times, items = (v[offsets[0] : offsets[-1]] for v in (grouped.columns["timestamp"], grouped.item_codes))
        begins = np.ones(len(times), dtype=bool)  # a moment of a user
        begins[1:] = times[1:] != times[:-1]
        begins[(offsets - offsets[0])[:-1][np.diff(offsets) > 0]] = True
        tied = ~begins | ~np.append(begins[1:], True)
        moment = np.cumsum(begins)[tied]
        pairs = np.sort(moment * len(grouped.item_ids) + items[tied])
        found += int((pairs[1:] == pairs[:-1]).sum())
    return found
