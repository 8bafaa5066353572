"""A log cut by the calendar: what comes before a date, then period after period, appended to a dataset folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from grzoo.data import Catalogue
from grzoo.data.prepare import EventLog, PrepareConfig, append_day, days, prepare_log
from grzoo.data.prepare.log import codes_of
from numpy.typing import NDArray

from .arguments import option
from .runtime import UserError

_UNITS = {"day": "D", "week": "W", "month": "M", "year": "Y"}
_MARK = "walk.json"


@dataclass
class WalkArguments:
    """How the log is walked."""

    period: Literal["day", "week", "month", "year"] = option("month", "What is appended, ranked and trained at once.")
    walk_from: str | None = option(
        None, "Date (2015-01-31) of the first period that is evaluated; default: that in which half of the events lie."
    )
    walk_periods: int | None = option(None, "Periods to walk; default: all.")


class PeriodLog:
    """The events of a log by period. `names`: the periods that are walked, such as "2015-03", those with events only.

    Raises UserError for a log without times, or a date that leaves nothing before or after it.
    """

    def __init__(self, log: EventLog, arguments: WalkArguments) -> None:
        if log.timestamps is None:
            raise UserError(f"{log.source} has no times, by which it could be walked: name its timestamp column")
        self.log, self.arguments = log, arguments
        unit = f"datetime64[{_UNITS[arguments.period]}]"
        self._period: NDArray[Any] = log.timestamps.astype("datetime64[s]").astype(unit)
        self._start = _start(self._period, arguments.walk_from, unit)
        walked = np.unique(self._period[self._period >= self._start])
        if not len(walked) or not (self._period < self._start).any():
            span = f"{self._period.min()} to {self._period.max()}"
            raise UserError(f"--walk_from {arguments.walk_from} leaves no event before or none after it: {span}")
        self._walked = walked[: arguments.walk_periods]
        self.names = [str(period) for period in self._walked]
        self._item_codes, self._items = codes_of(log.items)
        self._user_codes = codes_of(log.users)[0]

    def make(self, folder: Path, name: str, resumed: bool) -> None:
        """Prepare the events before the first period as `train`; a folder that a walk has made is made anew.

        resumed: keep it instead; UserError where it is of another walk.
        """
        mark = folder / _MARK
        made_of = {"log": name, "period": self.arguments.period, "from": str(self._start), "events": len(self.log)}
        if resumed:
            found = json.loads(mark.read_text()) if mark.is_file() else None
            if found != made_of:
                raise UserError(f"{folder} is not of the walk that is resumed: it is of {found}, not of {made_of}")
            return
        config = PrepareConfig(name=name, output_dir=str(folder), split="none", overwrite=mark.is_file())
        prepare_log(self.log.filter(self._period < self._start), config)
        mark.write_text(json.dumps(made_of))

    def append(self, folder: Path, number: int) -> str:
        """Append the events of the `number`-th period unless that was done; the name of its split."""
        appended = days(folder)
        if len(appended) > number:
            return appended[number]
        return append_day(folder, self.log.filter(self._period == self._walked[number]))

    def counts_before(self, catalogue: Catalogue, number: int) -> NDArray[np.int64]:
        """Events of each item of the catalogue before the `number`-th period, int64 [items]."""
        ids, known = catalogue.encode(self._items.to_pylist())
        earlier = self._item_codes[self._period < self._walked[number]]
        events = np.bincount(earlier, minlength=len(ids))
        counts = np.zeros(len(catalogue), dtype=np.int64)
        counts[catalogue.index_of(ids[known])] = events[known]
        return counts

    def describe(self, number: int) -> dict[str, int | float]:
        """Events, users and items of the `number`-th period; which of them are new, and the share of new items."""
        earlier, now = (self._period < self._walked[number], self._period == self._walked[number])
        users, items = np.unique(self._user_codes[now]), np.unique(self._item_codes[now])
        new_items = np.setdiff1d(items, self._item_codes[earlier])
        on_new = int(np.isin(self._item_codes[now], new_items).sum())
        return {
            "events": int(now.sum()),
            "users": len(users),
            "new_users": len(np.setdiff1d(users, self._user_codes[earlier])),
            "items": len(items),
            "new_items": len(new_items),
            "share_of_events_on_new_items": on_new / int(now.sum()),
        }


def _start(period: NDArray[Any], walk_from: str | None, unit: str) -> Any:
    if walk_from is None:
        return np.sort(period)[len(period) // 2]
    try:
        return np.datetime64(walk_from).astype(unit)
    except ValueError as error:
        raise UserError(f"--walk_from {walk_from!r} is not a date such as 2015-01-31") from error
