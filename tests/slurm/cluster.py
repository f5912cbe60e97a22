"""A SLURM cluster of virtual nodes on this machine, in a folder of its own, without systemd.

One munged, one slurmctld and a slurmd per node, on free ports. All of it, jobs included, carries a mark in its
environment by which nothing is left behind in the end. The one file elsewhere is /etc/slurm/slurm.conf: Snakemake's job
step takes SLURM_CONF away from the commands inside a job, so `srun` there finds the cluster at its default place only.

    python tests/slurm/cluster.py FOLDER sinfo       a cluster for the length of a command, `bash` for instance
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

DEFAULT_CONFIG = Path("/etc/slurm/slurm.conf")
MARK = "VLM_TEST_CLUSTER"
PARTITION = "main"
URGENT = "urgent"
"""The partition whose jobs take the nodes of the other's."""
_START_SECONDS = 30.0

CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=2
GresTypes=gpu
ReturnToService=2
MinJobAge=3600
KillWait={kill_wait}
SlurmdTimeout=20
MessageTimeout=10
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports}] CPUs={cpus} RealMemory={memory_mb} \
Gres=gpu:{gpus}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName={partition} Nodes=ALL Default={default} MaxTime=INFINITE State=UP PriorityTier=1
PartitionName={urgent} Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can be had here; empty where one can."""
    if absent := [name for name in ("slurmctld", "slurmd", "munged", "srun") if shutil.which(name) is None]:
        return f"SLURM is not installed ({', '.join(absent)}): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "the daemons of several nodes on one machine need root"
    if DEFAULT_CONFIG.exists() and not DEFAULT_CONFIG.is_symlink():
        return f"this machine has a SLURM of its own: {DEFAULT_CONFIG}"
    return ""


class Cluster:
    """A context; the nodes are n1, n2, ...

    Args:
        folder: new; keeps configuration, state and logs. Its path must be short: it holds a socket.
        gpus: of each node; character devices that are copies of /dev/null.
        kill_wait: seconds between SIGTERM and SIGKILL at the end of a job.
        default: whether the partition `main` is where jobs go that name none.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        gpus: int = 2,
        cpus: int = 8,
        memory_mb: int = 64000,
        kill_wait: int = 30,
        default: bool = False,
    ) -> None:
        self.folder = folder.resolve()
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self.gpus = gpus
        self.environment = {**os.environ, MARK: str(self.folder)}
        self._values = {
            "nodes": nodes,
            "gpus": gpus,
            "cpus": cpus,
            "memory_mb": memory_mb,
            "kill_wait": kill_wait,
            "default": "YES" if default else "NO",
            "partition": PARTITION,
            "urgent": URGENT,
            "folder": self.folder,
        }

    def __enter__(self) -> Cluster:
        if reason := missing():
            raise RuntimeError(reason)
        # Ends the cluster when this process has ended, however it did: the pipe is closed then.
        guard = [sys.executable, __file__, "--guard", str(self.folder)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._configure()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _configure(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        devices = []
        for number in range(self.gpus):
            devices.append(self.folder / f"gpu{number}")
            os.mknod(devices[-1], stat.S_IFCHR | 0o666, os.makedev(1, 3))
        ports = _free_ports(len(self.nodes) + 1)
        text = CONFIG.format(controller_port=ports[0], ports=",".join(map(str, ports[1:])), **self._values)
        (self.folder / "slurm.conf").write_text(text)
        files = f"{self.folder}/gpu[0-{self.gpus - 1}]" if self.gpus > 1 else f"{self.folder}/gpu0"
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{len(self.nodes)}] Name=gpu File={files}\n")
        if DEFAULT_CONFIG.is_symlink():
            owner = DEFAULT_CONFIG.readlink().parent
            if _marked(owner):
                raise RuntimeError(f"another cluster of this kind runs: {owner}")
            DEFAULT_CONFIG.unlink()  # left by one that was killed
        DEFAULT_CONFIG.parent.mkdir(exist_ok=True)
        DEFAULT_CONFIG.symlink_to(self.folder / "slurm.conf")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)  # munged wants no folder that others may write to

    def _start(self) -> None:
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={self.folder}/munge.{name}" for option, name in places.items()]
        self._daemon("munged", "--force", *munge)
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self._await(lambda: set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == set(self.nodes))

    def _daemon(self, *command: str) -> None:
        variables = {**self.environment, "SLURM_CONF": str(self.folder / "slurm.conf")}
        started = subprocess.run(
            command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
        if started.returncode:
            raise RuntimeError(f"{command[0]} did not start: {started.stderr}")

    def start_controller(self) -> None:
        self._daemon("slurmctld")
        self._await(lambda: "is UP" in self.run("scontrol", "ping"))

    def stop_controller(self) -> None:
        """As a controller that is down for maintenance; jobs go on."""
        _end(_by_pid_file(self.folder / "slurmctld.pid"))

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """As a machine that loses power: the daemon and all it has started are gone at once."""
        daemon = _by_pid_file(self.folder / f"slurmd.{node}.pid")
        steps = [one for one in _marked(self.folder) if one.environ().get("SLURMD_NODENAME") == node]
        for process in [*daemon, *steps]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def run(self, *command: str) -> str:
        """A SLURM command's standard output, empty where it failed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else ""

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs of the last hour, as `scontrol show job` tells them, oldest first."""
        text = self.run("scontrol", "show", "job", "--oneliner")
        fields = [dict(field.split("=", 1) for field in line.split() if "=" in field) for line in text.splitlines()]
        return sorted((job for job in fields if "JobId" in job), key=lambda job: int(job["JobId"]))

    def state(self, job: str) -> str:
        return next(one["JobState"] for one in self.jobs() if one["JobId"] == job)

    def stop(self) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait(60)

    def _await(self, happened: Any) -> None:
        end = time.monotonic() + _START_SECONDS
        while not happened():
            if time.monotonic() > end:
                logs = [path.read_text()[-2000:] for path in self.folder.glob("slurm*.log")]
                raise RuntimeError("the cluster does not start:\n" + "\n".join(logs))
            time.sleep(0.1)


def end_all(folder: Path) -> None:
    """End all that carries a cluster's mark, jobs and strays of lost nodes included."""
    for attempt in range(10):
        left = [one for one in _marked(folder) if one.pid != os.getpid()]
        if not left:
            break
        _end(left, signal.SIGTERM if attempt == 0 else signal.SIGKILL)
    if DEFAULT_CONFIG.is_symlink() and DEFAULT_CONFIG.readlink() == folder / "slurm.conf":
        DEFAULT_CONFIG.unlink()


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return sorted(one.getsockname()[1] for one in sockets)


def _marked(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            variables = process.environ()  # slurmstepd has nothing else in it
            if variables.get(MARK) == str(folder) or variables.get("SLURM_CONF") == f"{folder}/slurm.conf":
                found.append(process)
    return found


def _by_pid_file(path: Path) -> list[psutil.Process]:
    with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
        return [psutil.Process(int(path.read_text()))]
    return []


def _end(processes: list[psutil.Process], number: int = signal.SIGTERM) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    psutil.wait_procs(processes, timeout=5)


if __name__ == "__main__":
    if sys.argv[1] == "--guard":
        sys.stdin.read()
        end_all(Path(sys.argv[2]))
        sys.exit()
    with Cluster(Path(sys.argv[1]), default=True) as cluster:
        print(json.dumps({"folder": str(cluster.folder), "nodes": cluster.nodes}), file=sys.stderr)
        sys.exit(subprocess.run(sys.argv[2:], env=cluster.environment).returncode)
