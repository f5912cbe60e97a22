# What each step asks of a cluster, from the configuration (vlm.resources); a profile can change it with `set-resources`.
# And what a SLURM run is refused for before its first job.
import math
import os
import re
import subprocess
from functools import cache

from vlm import resources as estimates
from vlm.resources.bases import KNOWN

SEGMENT_MINUTES = 24 * 60
"""Time limit of a training that takes longer: it is stopped then, and a retry goes on."""
WARNING_SECONDS = 300
"""How long before its time limit a training is asked to save. SLURM may be a minute early."""
GPU = estimates.gpu("h100")
"""What times are estimated for."""
NEEDS = {
    "fetch": {"cpus_per_task": 4, "mem_mb": 8000, "runtime": 24 * 60},
    "shard": {"cpus_per_task": 8, "mem_mb": 16000, "runtime": 8 * 60},
    "index": {"cpus_per_task": 4, "mem_mb": 8000, "runtime": 4 * 60},
    "score": {"cpus_per_task": 2, "mem_mb": 8000, "runtime": 2 * 60},
    "bench": {"cpus_per_task": 8, "mem_mb": 64000, "runtime": 24 * 60, "gres": "gpu:1"},
}
"""Steps whose needs do not depend on the models."""
LONGEST_LOOK_SECONDS = 180
"""Between two looks at the states of jobs: the most that the SLURM executor waits."""
SHOWN_NEEDS = ("nodes", "gres", "tasks_per_node", "cpus_per_task", "mem_mb", "disk_mb", "runtime")
"""What a dry run shows of a job."""


@cache
def bases():
    """The base models' sizes. What is known of neither the disk nor the table is taken for the full recipe's models,
    until it has been fetched."""
    try:
        return estimates.bases(CONFIG)
    except ValueError as unknown:
        if submits():
            print(f"{unknown}. Until then jobs ask for what the full recipe's models need.", file=sys.stderr)
        stand_ins = dict(zip(PARTS, KNOWN, strict=True))
        known = CONFIG.models.model_copy(
            update={
                part: getattr(CONFIG.models, part).model_copy(update={"source": source})
                for part, source in stand_ins.items()
            }
        )
        return estimates.bases(CONFIG.model_copy(update={"models": known}))


def asked(estimate, **more):
    """Resources as the SLURM executor names them. `gpus` would reach the inner srun but never sbatch, hence `gres`."""
    need = {
        "cpus_per_task": estimate.cpus_per_task,
        "mem_mb": estimate.mem_mb,
        "disk_mb": estimate.disk_mb,
        "runtime": estimate.runtime_minutes,
    }
    return need | ({"gres": f"gpu:{estimate.gpus_per_node}"} if estimate.gpus_per_node else {}) | more


def conversion_needs(step):
    return asked(estimates.of_conversion(CONFIG, step, bases()))


def generation_need(name):
    """For `resources`: one need of generating, which differs from task to task."""
    return lambda wildcards: asked(estimates.of_generation(CONFIG, wildcards.task, bases()))[name]


def training_need(name):
    """For `resources`: one need of training a stage. The executor refuses `mpi` jobs of a single task, so that SLURM
    counts a task per rank; the job then starts one launcher per node, with the processors of all its tasks."""

    def of(wildcards):
        tasks = max(2, CONFIG.parallel.ranks_per_node)
        estimate = estimates.of_training(CONFIG, wildcards.stage, bases(), GPU)
        return asked(
            estimate,
            nodes=estimate.nodes,
            tasks_per_node=tasks,
            cpus_per_task=math.ceil(estimate.cpus_per_task / tasks),
            runtime=min(estimate.runtime_minutes, SEGMENT_MINUTES),
        )[name]

    return of


GENERATION_NEEDS = {name: generation_need(name) for name in ("cpus_per_task", "mem_mb", "disk_mb", "runtime", "gres")}
TRAINING_NEEDS = {
    name: training_need(name)
    for name in ("nodes", "tasks_per_node", "cpus_per_task", "mem_mb", "disk_mb", "runtime", "gres")
} | {
    # The signal goes to the launchers alone, since it comes in `mpi` mode; else it would end Snakemake's own process.
    # A job that is put back into the queue keeps what its log said before.
    "slurm_extra": f"--signal=USR1@{WARNING_SECONDS} --open-mode=append",
}


def starter(wildcards):
    """What starts the launchers on the nodes of a training job. As the resource `mpi` it also keeps the SLURM executor
    from wrapping the job in a step of its own, which signals would end and which holds one node."""
    inside = workflow.remote_exec and "SLURM_JOB_ID" in os.environ
    return "srun" if inside or submits() else ""


def contained(wildcards):
    """What runs a training's launchers in the container."""
    arguments = workflow.deployment_settings.apptainer_args
    return f'apptainer exec --bind "$PWD" --pwd "$PWD" {arguments} {IMAGE}' if CONTAINED else ""


def submits():
    """Whether this process submits jobs to SLURM. The jobs read the workflow too."""
    return workflow.executor_plugin is not None and workflow.executor_plugin.name == "slurm"


def slurm(*command):
    """What a command of SLURM prints. It may wait for a controller that does not answer, but not for ever."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=45)
    except FileNotFoundError:
        raise WorkflowError(f"SLURM is not installed here: there is no {command[0]}") from None
    except subprocess.TimeoutExpired:
        raise WorkflowError(f"SLURM does not answer: `{' '.join(command)}` took more than 45 seconds") from None
    if done.returncode:
        raise WorkflowError(f"SLURM does not answer: `{' '.join(command)}` says: {done.stderr.strip()}")
    return done.stdout


def check_cluster(jobs):
    """Refuse a run that would fail job by job, or wait for ever.

    Args:
        jobs: what is to be submitted.

    Raises:
        WorkflowError: the controller does not answer, a partition is not named or not there, the states of jobs cannot
            be known, or jobs of an earlier run in this folder are still alive.
    """
    partitions = slurm("sinfo", "-h", "-o", "%P").split()
    names = sorted(one.rstrip("*") for one in partitions)
    ways = (
        f"default-resources of the profile (or --default-resources slurm_partition=...); there are {', '.join(names)}"
    )
    for asked in sorted({str(job.resources.get("slurm_partition") or "") for job in jobs}):
        if not asked and not any(one.endswith("*") for one in partitions):
            raise WorkflowError(f"slurm_partition: this cluster has no default partition, name one in {ways}")
        if asked and not set(asked.split(",")) <= set(names):
            raise WorkflowError(f"slurm_partition: {asked!r} is no partition of this cluster, change {ways}")
    check_status_command()
    alive = [
        line.split()[0]
        for line in slurm("squeue", "-h", "--me", "-o", "%i %k %Z").splitlines()
        if line.split()[1].startswith("rule_") and line.endswith(f" {Path.cwd()}")
    ]
    if alive:
        raise WorkflowError(
            f"SLURM jobs of an earlier run in this folder are still there: {' '.join(alive)}. Wait until they have ended "
            "or `scancel` them; then the same command goes on"
        )


def check_status_command():
    """Refuse a source of job states by which a run would wait for ever: it takes a job that it is not told of for one
    that goes on."""
    if workflow.executor_settings.status_command == "sacct":
        try:
            slurm("sacct", "-X", "-n", "-j", "1")
        except WorkflowError as error:
            raise WorkflowError(f"slurm-status-command: sacct does not work here, use squeue. {error}") from None
    else:
        age = re.search(r"^MinJobAge\s*=\s*(\d+)", slurm("scontrol", "show", "config"), re.MULTILINE)
        if age and int(age[1]) <= LONGEST_LOOK_SECONDS:
            raise WorkflowError(
                f"slurm-status-command: squeue knows ended jobs for {age[1]} seconds here (MinJobAge), and there may be "
                f"{LONGEST_LOOK_SECONDS} between two looks; use sacct"
            )


def check_start():
    """Refuse what this run's executor or a missing image cannot do, before the first job; errors as those of
    `check_cluster`."""
    jobs = list(workflow.dag.needrun_jobs())
    if CONTAINED and not Path(IMAGE).exists():
        raise WorkflowError(f"{IMAGE}: there is no such image in this folder; docs/cluster.md says how to build it")
    if submits():
        check_cluster([job for job in jobs if not job.is_local])
    elif CONFIG.parallel.nodes > 1 and any(job.rule.name == "train" for job in jobs):
        raise WorkflowError(
            f"parallel.nodes: {CONFIG.parallel.nodes} machines are for a run on SLURM (profiles/slurm); here use 1 and "
            "raise parallel.ranks_per_node"
        )
