"""One run that trains on packs already loaded, on all ranks: what `plait train` drives."""

from collections.abc import Sequence

from plait.datasets.assembly import Pack
from plait.modalities import Limits
from plait.trainer.build import Built
from plait.trainer.checkpoint import Snapshot
from plait.trainer.engine import commands
from plait.trainer.engine.commands import MicroBatch
from plait.trainer.engine.runs import Run
from plait.trainer.engine.team import Team
from plait.trainer.model import LEARN
from plait.trainer.optimiser import StepSettings
from plait.trainer.spec import ModelSpec

_NAME = "trained"


class Learner:
    """A run on a team of its own. Packs of one turn are computed at the same time, one a rank.

    Args:
        team: Whose ranks compute; it is closed with this.
        limits: How large a media file may be.
    """

    def __init__(self, team: Team, spec: ModelSpec, seed: int, limits: Limits) -> None:
        self._team = team
        self.built: Built = team.execute(commands.CreateRun(_NAME, spec, seed, limits))

    @property
    def run(self) -> Run:
        """As rank 0 has it."""
        return self._team.executor.run(_NAME)

    @property
    def ranks(self) -> int:
        """Packs of a turn at most."""
        return self._team.devices

    def learn(self, packs: Sequence[Pack]) -> tuple[float, float]:
        """Add the gradients of a turn's packs; their summed loss and weight.

        Raises:
            DataError: a loss, or a gradient, is not finite.
            ModelError: memory ended, or a rank.
        """
        self._team.execute(commands.Begin(_NAME, passes=len(packs)))
        rows = [
            [MicroBatch(_NAME, pack.documents, LEARN, True, (0,), pack.inputs, behind)]
            for pack, behind in zip(packs, reversed(range(len(packs))), strict=True)
        ]
        results = [result for [result] in self._team.compute(rows)]
        for result in results:
            if isinstance(result, Exception):
                self._team.execute(commands.Abandon(_NAME, str(result)))
                raise result
        self._team.execute(commands.Finish(_NAME))
        documents = [one for result in results if isinstance(result, list) for one in result]
        return sum(one.loss for one in documents), sum(one.weight for one in documents)

    def step(self, settings: StepSettings) -> dict[str, float]:
        """One step by the mean over the weights of what was learned since the last."""
        metrics: dict[str, float] = self._team.execute(
            commands.OptimStep(_NAME, settings, divide_by_weight=True)
        )
        return metrics

    def snapshot(self, *, weights_only: bool = False) -> Snapshot:
        """The run as it is, gathered from all ranks."""
        return self._team.gather(commands.Gather(_NAME, weights_only))

    def restore(self, snapshot: Snapshot) -> None:
        """Put the run where a snapshot that fits it has it."""
        self._team.restore(commands.Restore(_NAME, snapshot))

    def close(self) -> None:
        self._team.close()


def learner_of(
    spec: ModelSpec, seed: int, limits: Limits, devices: int = 1, strategy: str = "ddp"
) -> Learner:
    """A run on ranks of its own.

    Raises:
        ConfigError, FetchError, ModelError: as `plait.trainer.build.attach`.
    """
    team = Team(devices, strategy, sampler_bytes=0)
    try:
        return Learner(team, spec, seed, limits)
    except BaseException:
        team.close()
        raise
