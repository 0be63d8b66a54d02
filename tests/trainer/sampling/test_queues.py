"""What waits costs a step nothing, and all of it ends when everything does."""

from typing import Any

import numpy as np
import pytest

from plait.trainer.sampling import sampler as sampling
from plait.trainer.sampling.sampler import Sampler
from plait.trainer.sampling.turns import Turns


class Crowd:
    """One model, and texts of any owner for it."""

    def __init__(self, whole: Any, desk: Any, **options: Any) -> None:
        self.whole, self.model = whole, whole.model()
        self.at = desk(Sampler(self.model.backbone, share=False, **options))

    def ask(self, seed: int, length: int, **options: Any) -> Any:
        ids = np.random.default_rng(seed).integers(1, 48, length).tolist()
        return self.at.ask(self.whole.request(self.model, self.whole.prompt(ids), **options))


class Looked(list[Any]):
    """A queue that counts how often it is looked into."""

    count = 0

    def __getitem__(self, at: Any) -> Any:
        self.count += 1
        return super().__getitem__(at)


def queued(crowd: Crowd, owners: dict[str, int]) -> dict[str, Looked]:
    """So many jobs that wait of each owner; they are numbered owner by owner."""
    for owner, number in owners.items():
        for _ in range(number):
            crowd.ask(1, 3, owner=owner)
    return {owner: Looked(queue) for owner, queue in crowd.at.sampler._waiting.by_owner.items()}


def test_what_waits_costs_nothing_until_its_turn(whole: Any, desk: Any) -> None:
    """A step takes the first of a queue of thousands, and does not look at the others."""
    queues = queued(Crowd(whole, desk), {"many": 2000, "one": 1})
    taken = [next(order).request.owner for order in [Turns().order_of(queues)] for _ in range(3)]
    assert taken == ["many", "one", "many"]
    assert queues["many"].count < 20


def test_jobs_that_leave_while_they_are_ordered_hide_no_others(whole: Any, desk: Any) -> None:
    """Some of those that come leave their queue at once, as admitted ones do; others stay."""
    crowd = Crowd(whole, desk)
    waiting = crowd.at.sampler._waiting
    queued(crowd, {"a": 7, "b": 4})
    found = []
    for number, job in enumerate(Turns().order_of(waiting.by_owner)):
        found.append((job.request.owner, job.number))
        if number % 3:
            waiting.discard(job)
            waiting.discard(job)
    pairs = [pair for n in range(4) for pair in (("a", n), ("b", 7 + n))]
    assert found == [*pairs, ("a", 4), ("a", 5), ("a", 6)]
    assert [job.number for job in waiting] == [0, 3, 5, 8]
    assert waiting.owners == {"a", "b"}


def test_an_owner_that_is_new_comes_behind_those_that_wait(whole: Any, desk: Any) -> None:
    """A loop that samples from a new snapshot at each step never ends the wait of another."""
    crowd, turns = Crowd(whole, desk), Turns()
    old = crowd.ask(1, 3, owner="old").job
    turns.serve(old)
    waiting = crowd.ask(2, 3, owner="old").job
    for number in range(3):
        new = crowd.ask(3, 3, owner=f"new {number}").job
        first, *_ = turns.order([new, waiting])
        assert first is waiting


def test_whatever_fails_all_ends_those_that_wait_too(whole: Any, desk: Any) -> None:
    crowd = Crowd(whole, desk, slots=30)
    outcomes = [crowd.ask(seed, 20, owner=str(seed), max_tokens=11) for seed in range(3)]
    crowd.at.step()
    crowd.at.sampler.fail(ValueError("broken"))
    assert all(isinstance(outcome.error, ValueError) for outcome in outcomes)
    assert not crowd.at.sampler.busy


def test_requests_that_ban_the_same_are_chosen_together(
    whole: Any, desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any client: the tokens of a step are chosen at once."""
    sizes, choose = [], sampling.choose

    def counted(logits: Any, *rest: Any) -> Any:
        sizes.append(len(logits))
        return choose(logits, *rest)

    monkeypatch.setattr(sampling, "choose", counted)
    crowd = Crowd(whole, desk)
    for seed in range(3):
        crowd.ask(seed, 5, max_tokens=4)
    crowd.at.finish()
    assert sizes == 4 * [3]
