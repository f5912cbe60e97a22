"""What a SLURM job costs beside its command: waiting for its start, starting, and until its end is noticed.

Without accounting, from what is there: the controller's memory of its jobs, snakemake's log, and the benchmark files of
a run with `--benchmark-extended`. All but the last count in whole seconds.
"""

from __future__ import annotations

import ast
import csv
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from workplace import Workplace


@dataclass(frozen=True)
class Job:
    """Seconds of one job."""

    name: str
    """As SLURM has it in the job's comment: rule and wildcards."""
    queued: float
    """From its submission to its start."""
    around: float
    """Between start and end, beside its command."""
    command: float
    noticed: float
    """From its end until snakemake said so."""

    @property
    def overhead(self) -> float:
        return self.queued + self.around + self.noticed


def of_jobs(workplace: Workplace) -> list[Job]:
    """Every job of one undisturbed run, in the order of their submission."""
    log = (workplace.folder / "snakemake.log").read_text()
    submitted = dict(re.findall(r"^Job (\d+) has been submitted with SLURM jobid (\d+)", log, re.MULTILINE))
    finished = {
        number: datetime.strptime(when, "%a %b %d %H:%M:%S %Y")
        for when, number in re.findall(r"^\[(.*)\]\nFinished jobid: (\d+) ", log, re.MULTILINE)
    }
    told = {job["JobId"]: job for job in workplace.jobs()}
    commands = command_seconds(workplace)
    jobs = []
    for number, slurm in submitted.items():
        name = told[slurm]["Comment"]
        times = [datetime.fromisoformat(told[slurm][field]) for field in ("SubmitTime", "StartTime", "EndTime")]
        times.append(finished[number])
        queued, there, noticed = (
            (later - earlier).total_seconds() for earlier, later in zip(times, times[1:], strict=False)
        )
        jobs.append(Job(name, queued, there - commands[name], commands[name], noticed))
    return jobs


def command_seconds(workplace: Workplace) -> dict[str, float]:
    """Seconds of every step's command, under the name that its job has."""
    seconds = {}
    for path in (workplace.results / "benchmarks").rglob("*.tsv"):
        with open(path, newline="") as file:
            line = next(csv.DictReader(file, delimiter="\t"))
        wildcards = "_".join(ast.literal_eval(line["wildcards"]).values())
        seconds[f"rule_{line['rule_name']}" + (f"_wildcards_{wildcards}" if wildcards else "")] = float(line["s"])
    return seconds


def table(jobs: Iterable[Job]) -> str:
    """Each part over all jobs. On a busy machine the least says what it takes on an idle one."""
    jobs = list(jobs)
    lines = [f"{f'{len(jobs)} jobs, seconds':<34}{'least':>10}{'median':>10}{'most':>10}"]
    for field, means in (
        ("queued", "submitted -> started"),
        ("around", "started -> ended, command aside"),
        ("noticed", "ended -> noticed"),
        ("overhead", "all three"),
        ("command", "the command itself"),
    ):
        values = [getattr(job, field) for job in jobs]
        lines.append(f"{means:<34}{min(values):>10.1f}{statistics.median(values):>10.1f}{max(values):>10.1f}")
    return "\n".join(lines)
