"""Room in a buffer of slots: stretches are taken and given back, neighbours join again."""

from bisect import bisect_left, insort

from plait.errors import ModelError


class Arena:
    """Slots 0 to `size`, of which stretches are free.

    Args:
        size: Slots to begin with; `grow` adds more at the end.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)] if size else []
        """(start, stop) in order, none touching the next."""

    @property
    def free(self) -> int:
        """Slots that nobody holds, in one piece or not."""
        return sum(stop - start for start, stop in self._free)

    def take(self, length: int) -> int | None:
        """The start of a stretch of `length` slots; None where there is none.

        The smallest free stretch that is large enough is cut, at its start.
        """
        fitting = [(stop - start, start) for start, stop in self._free if stop - start >= length]
        if not fitting:
            return None
        size, start = min(fitting)
        at = bisect_left(self._free, (start, 0))
        if size == length:
            del self._free[at]
        else:
            self._free[at] = (start + length, start + size)
        return start

    def give(self, start: int, length: int) -> None:
        """Give a stretch back.

        Raises:
            ModelError: some of it is free already, or was never there.
        """
        stop = start + length
        at = bisect_left(self._free, (start, 0))
        before = self._free[at - 1] if at else None
        after = self._free[at] if at < len(self._free) else None
        free = (before and before[1] > start) or (after and after[0] < stop)
        if free or start < 0 or stop > self.size:
            raise ModelError(f"slots {start} to {stop} are given back twice, or are not there")
        if after and after[0] == stop:
            stop = self._free.pop(at)[1]
        if before and before[1] == start:
            start = self._free.pop(at - 1)[0]
        insort(self._free, (start, stop))

    def grow(self, size: int) -> None:
        """Add free slots at the end, up to `size`."""
        if size > self.size:
            added, before = size - self.size, self.size
            self.size = size
            self.give(before, added)
