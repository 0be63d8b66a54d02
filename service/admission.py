"""What one owner may have and ask for, checked before anything of it is promised."""

from sqlalchemy import Connection, func, select

from plait.service.database.tables import runs
from plait.service.errors import BusyError, ServiceError
from plait.service.running import Runner
from plait.service.settings import Quotas


class Admission:
    """Lets in what an owner's quotas have room for."""

    def __init__(self, quotas: Quotas, runner: Runner) -> None:
        self._quotas, self._runner = quotas, runner

    def check_waiting(self, owner: str, scope: str, seq: int) -> None:
        """
        Raises:
            BusyError: too much of this owner waits already.
        """
        if self._is_waited_for(scope, seq):
            return
        quotas, recorder = self._quotas, self._runner.recorder
        if recorder.waiting_of.get(owner, 0) >= quotas.waiting:
            raise BusyError(f"{quotas.waiting} requests wait already; try again later")
        if recorder.bytes_of.get(owner, 0) >= quotas.waiting_bytes:
            raise BusyError(f"{quotas.waiting_bytes} bytes wait already; try again later")

    def _is_waited_for(self, name: str, seq: int) -> bool:
        """Whether others of a run cannot be done before this one: to refuse it makes them wait."""
        scope = self._runner.scopes.get(name)
        if scope is None or not scope.is_run or not scope.waiting:
            return False
        return scope.first() is None and seq == scope.next

    def check_runs(self, connection: Connection, owner: str) -> None:
        """In the transaction that makes a run, so that two at once are counted.

        Raises:
            ServiceError: this owner has as many runs as may be.
        """
        most = self._quotas.runs
        mine = select(func.count(runs.c.id)).where(runs.c.owner == owner)
        if connection.execute(mine).scalar_one() >= most:
            raise ServiceError(
                f"an owner has up to {most} runs here; ask the operator for more", 422
            )
