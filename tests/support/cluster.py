"""A real Slurm of two virtual nodes on the loopback interface, for as long as the tests run.

munged, slurmctld and two slurmd are children of the tests, with a temporary directory and ports of their own, so
that a Slurm that is installed on the machine is neither used nor disturbed.
"""

from __future__ import annotations

import ctypes
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.tiny import SYSTEM_PATH, free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo", "squeue")
NODES = ("n1", "n2")
PATIENCE = 600  # seconds for what hangs

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=600
KillWait=300
FirstJobId={job}
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=4 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""


class Cluster:
    """The daemons, and what tests ask of them. ``environment`` leads Slurm's commands to this cluster."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self.environment = {**os.environ, "SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": SYSTEM_PATH}
        self.daemons: list[subprocess.Popen[bytes]] = []
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(mode=0o755)
        port = free_ports(1 + len(NODES))
        settings = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser(), "folder": self.folder}
        ports = {"port": port, "first": port + 1, "last": port + len(NODES), "nodes": ",".join(NODES)}
        job = random.SystemRandom().randrange(1, 9000)  # a job's ranks meet at a port that its number gives
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**settings, **ports, job=job))
        if not Path("/sys/fs/cgroup").is_dir() or not any(Path("/sys/fs/cgroup").iterdir()):
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # else slurmd looks for a mount

    def start(self) -> None:
        """Start the daemons and wait until both nodes take jobs."""
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        self._daemon(
            "munged", "--force", "--foreground", f"--socket={munge}/socket", f"--key-file={munge}/key",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self._wait(lambda: (munge / "socket").exists(), PATIENCE)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: self.command("sinfo", "-h", "-o", "%D %t", check=False).split() == ["2", "idle"],
                   PATIENCE)  # fmt: skip

    def stop(self) -> None:
        """End every job and then the daemons."""
        if self.daemons and all(daemon.poll() is None for daemon in self.daemons):
            user = f"--user={getpass.getuser()}"
            self.command("scancel", "--full", "--signal=KILL", user, check=False)
            self.command("scancel", user, check=False)
            self._wait(lambda: not self.command("squeue", "-h", check=False), PATIENCE)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            daemon.wait(PATIENCE)
        shutil.rmtree(self.folder)

    def command(self, *arguments: str, check: bool = True) -> str:
        """Return what one of Slurm's commands prints."""
        result = subprocess.run(arguments, env=self.environment, capture_output=True, text=True)
        assert not check or result.returncode == 0, (arguments, result.stderr)
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return what Slurm knows of a job, by its id (of an array's task: ``ID_TASK``)."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", "-o", job)))

    def wait_for_state(self, job: str, *states: str) -> dict[str, str]:
        """Wait until a job has one of ``states`` and return what is known of it."""
        self._wait(lambda: self.job(job)["JobState"] in states, PATIENCE, lambda: str(self.job(job)))
        return self.job(job)

    def start_again_soon(self, job: str) -> None:
        """Shorten the two minutes that a requeued job waits.

        Not to nothing: of a credential Slurm knows the second, and refuses one of the second in which it revoked the
        first start's ("Job credential revoked" in slurmctld's log).
        """
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds, as long as a job may take."""
        self._wait(condition, PATIENCE)

    def _wait(self, condition: Callable[[], bool], seconds: float, told: Callable[[], str] = lambda: "") -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = {log.name: log.read_text()[-2000:] for log in self.folder.glob("*.log")}
                raise AssertionError(f"waited {seconds} s for nothing {told()}\n{logs}")
            time.sleep(0.1)

    def _daemon(self, *command: str) -> None:
        def die_with_tests() -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)

        with (self.folder / f"{command[0]}.out").open("ab") as log:
            daemon = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, preexec_fn=die_with_tests, start_new_session=True
            )
        self.daemons.append(daemon)
