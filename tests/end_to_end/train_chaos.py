"""Kills a stage again and again, in moments drawn by a seed, and lets it go on each time until it has finished."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

import train_process
from train_process import Event
from train_runs import Runs, assert_same, log

SHAPES = {
    # function, largest number of the call, largest delay in seconds
    "load": [
        ("vlm.checkpoint.model:read_state", 1, 0.02),
        ("vlm.loader:Loader.__next__", 3, 0.005),
    ],
    "step": [
        ("vlm.train.step:Step.__call__", 3, 0.05),
        ("vlm.train.feed:Feed.__next__", 3, 0.005),
    ],
    "save": [
        ("vlm.checkpoint.model:write_state", 1, 0.05),
        ("vlm.checkpoint.pending:write", 2, 0.005),
        ("vlm.files:put_in_place", 1, 0.005),
        ("vlm.checkpoint.places:point_to", 1, 0.005),
        ("vlm.checkpoint.places:prune", 1, 0.002),
    ],
}
"""What a kill of each kind happens in; the end of the call cuts the delay short, so that it is in there for sure."""


@dataclass
class Chaos:
    """One stage at one number of ranks."""

    runs: Runs
    folder: Path
    stage: str
    world: int
    config: Path
    seed: int
    moments: Counter[str] = field(default_factory=Counter)
    """Kills that happened, by `kind: function`."""

    def __post_init__(self) -> None:
        self.draw = random.Random(f"{self.seed} {self.stage} {self.world}")

    @property
    def kinds(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for moment, times in self.moments.items():
            found[moment.split(":")[0]] += times
        return found

    def run(self, kills: int) -> None:
        """Kill as often, over as many runs as it takes, and compare every finished one with `undisturbed`."""
        kinds = [list(SHAPES)[number % len(SHAPES)] for number in range(kills)]
        self.draw.shuffle(kinds)
        undisturbed = self.folder / "undisturbed"
        assert self.start(undisturbed, {}) == [0] * self.world, log(undisturbed)
        rounds = 0
        while kinds:
            out, rounds = self.folder / f"killed-{rounds}", rounds + 1
            while not (out / "finished.json").exists():
                self.once(out, kinds)
            assert_same(out, undisturbed)

    def once(self, out: Path, kinds: list[str]) -> None:
        """One start, which ends by a kill of the next kind; or well, if that moment does not come any more."""
        if not kinds:
            codes = self.start(out, {})
            assert codes == [0] * self.world, (codes, log(out))
            return
        target, calls, seconds = self.draw.choice(SHAPES[kinds[-1]])
        event = Event(target, self.draw.randint(1, calls), within_seconds=self.draw.uniform(0, seconds))
        # Only the first rank gives a checkpoint its name.
        rank = 0 if "files" in target or "places" in target else self.draw.randrange(self.world)
        codes = self.start(out, {rank: [event]})
        if -9 in codes:
            self.moments[f"{kinds.pop()}: {target.split(':')[1]}"] += 1
        else:
            assert codes == [0] * self.world, (codes, log(out))

    def start(self, out: Path, events: dict[int, list[Event]]) -> list[int]:
        """Exit codes of all ranks. When one was killed, the others go with it, as under the launcher."""
        if self.world == 1:
            return [self.runs.train(self.stage, out, *events.get(0, []), config=self.config)]
        ranks = self.runs.start_ranks(self.stage, out, events, config=self.config)
        while running := [rank.sentinel for rank in ranks if rank.exitcode is None]:
            assert connection.wait(running, timeout=120), log(out)
            if any(rank.exitcode == -9 for rank in ranks):
                for rank in ranks:
                    rank.kill()
        return [train_process.finish(rank) for rank in ranks]

    def report(self) -> str:
        lines = [f"  {times} x {moment}" for moment, times in sorted(self.moments.items())]
        total = f"{self.stage}, {self.world} rank(s), seed {self.seed}: {self.moments.total()} kills, " + ", ".join(
            f"{times} in a {kind}" for kind, times in sorted(self.kinds.items())
        )
        return "\n".join([total, *lines])
