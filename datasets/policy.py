"""What happens to rows that cannot be used, and how many may break before a run stops."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from plait.errors import ConfigError, DataError, FailureBudgetError, Origin

TooLong = Literal["drop", "error", "truncate"]

REASONS_SHOWN = 5
"""Reasons that the summary of a stopped run counts, the most frequent first."""


@dataclass(slots=True)
class FailurePolicy:
    """Told of each row that was used and each that broke, in order; raises when too many break.

    The total counts rows, not attempts: a picture that breaks in every epoch is one broken row.
    """

    on_error: Literal["raise", "skip"] = "raise"
    """"raise" stops at the first broken row; "skip" leaves it out and goes on."""

    max_consecutive: int | None = 16
    """Broken rows in a row, with no good one between, that are still skipped; None: any number.
    Many at once mean a missing disk rather than bad files."""

    max_total: int | None = 100
    """Broken rows of a run that are still skipped; None: any number."""

    too_long: TooLong = "error"
    """What happens to a row that no pack can hold; "truncate" cuts text off its end, after its
    last media item, and drops it where that does not help."""

    _consecutive: int = field(default=0, init=False)
    _broken: dict[tuple[str, int | None, str], str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error is 'raise' or 'skip', not {self.on_error!r}")
        if self.too_long not in get_args(TooLong):
            raise ConfigError(f"too_long is 'drop', 'error' or 'truncate', not {self.too_long!r}")
        for name in ("max_consecutive", "max_total"):
            limit = getattr(self, name)
            if limit is not None and limit < 0:
                raise ConfigError(f"{name} must be 0 or more, or none for no limit; not {limit}")

    @property
    def total(self) -> int:
        """Rows that broke so far."""
        return len(self._broken)

    @property
    def consecutive(self) -> int:
        """Rows that broke since the last good one."""
        return self._consecutive

    def success(self) -> None:
        """A row was used."""
        self._consecutive = 0

    def failure(self, error: DataError) -> None:
        """A row broke.

        Raises:
            DataError: `error` itself, where the policy is to raise.
            FailureBudgetError: more rows broke than the policy allows; names the last ones.
        """
        if self.on_error == "raise":
            raise error
        self._consecutive += 1
        self._broken[error.origin.dataset, error.origin.row, error.origin.file] = error.message
        if self.max_total is not None and self.total > self.max_total:
            self._stop("in a run", self.total, "max_total", self.max_total, error)
        if self.max_consecutive is not None and self._consecutive > self.max_consecutive:
            self._stop(
                "one after another", self._consecutive, "max_consecutive", self.max_consecutive,
                error,
            )  # fmt: skip

    def _stop(self, which: str, found: int, name: str, limit: int, error: DataError) -> None:
        last = [f"{message} ({Origin(*key)})" for key, message in self._broken.items()][-3:]
        raise FailureBudgetError(
            f"at most {limit} broken rows {which} are skipped and {found} broke; mend or remove "
            f"them, or raise {name}. Broken so far: {self.summary()}. The last: " + "; ".join(last),
            error.origin,
        ) from error

    def summary(self) -> str:
        """The rows that broke, counted by the rule they broke: "7 x a picture must be whole"."""
        rules = Counter(rule_of(message) for message in self._broken.values()).most_common()
        shown = [f"{number} x {rule}" for rule, number in rules[:REASONS_SHOWN]]
        rest = sum(number for _, number in rules[REASONS_SHOWN:])
        return "; ".join([*shown, *([f"{rest} x other reasons"] if rest else [])])

    def state_dict(self) -> dict[str, Any]:
        """The counters, ready for JSON. The limits are settings and not part of it."""
        broken = [[*key, message] for key, message in self._broken.items()]
        return {"consecutive": self._consecutive, "broken": broken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up counters that `state_dict` gave."""
        self._consecutive = int(state["consecutive"])
        self._broken = {
            (dataset, row, file): message for dataset, row, file, message in state["broken"]
        }


def rule_of(message: str) -> str:
    """The first clause of a message, without the numbers of one file."""
    return re.sub(r"\d[\d,.]*", "N", re.split(r"[;:]", message, maxsplit=1)[0]).strip()
