"""How does a test get a real SLURM cluster, of this machine alone?

From Debian's packages: apt-get install slurm-wlm munge. A `Slurm` is a munged, a slurmctld and a
slurmd on the loopback interface, on free ports, with all their files in one directory. Only they
are signalled, and the jobs that they started; nothing survives the `with` block.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.cluster_processes import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={megabytes} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if _find(name) is None]


class Slurm:
    """A SLURM cluster of one node.

    Parameters
    ----------
    directory : Path
        For configuration, key, state and logs.
    cpus, megabytes : of the node, whatever this machine has
    """

    def __init__(self, directory: Path, cpus: int = 4, megabytes: int = 4096):
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
        self._size = {"cpus": cpus, "megabytes": megabytes}
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Slurm:
        for name in ("state", "spool"):
            (self.directory / name).mkdir()
        key, socket_path = self.directory / "munge.key", self.directory / "munge.socket"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        (self.directory / "slurm.conf").write_text(
            CONFIGURATION.format(
                directory=self.directory,
                host=socket.gethostname().partition(".")[0],
                user=getpass.getuser(),
                controller_port=_free_port(),
                node_port=_free_port(),
                **self._size,
            )
        )
        try:
            munge = ("--foreground", "--force", f"--key-file={key}", f"--socket={socket_path}")
            files = ("pid", "seed", "log")
            munge += tuple(f"--{name}-file={self.directory}/munge.{name}" for name in files)
            self._start("munged", *munge)
            wait_until(socket_path.exists, f"munged runs: {self.log('munged')}")
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D")
            idle = ("sinfo", "--noheader", "--format=%T")
            wait_until(lambda: self.ask(*idle) == "idle", f"the node is idle: {self.log('slurmd')}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.SubprocessError):
            self.ask("scancel", "--partition=all")
            wait_until(lambda: not self.jobs(), "no job is left", seconds=20)
        for process in reversed(self._processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def ask(self, *command: str) -> str:
        """Run one of SLURM's commands, and give what it prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout.strip()

    def jobs(self, *states: str) -> list[str]:
        """Jobs that have not ended, or those of some states; elements of arrays one by one."""
        select = [f"--states={','.join(states)}"] if states else []
        return self.ask("squeue", "--array", "--noheader", *select, "--format=%i").splitlines()

    def log(self, name: str) -> str:
        path = self.directory / f"{name}.out"
        return path.read_text() if path.exists() else ""

    def _start(self, name: str, *options: str) -> None:
        with open(self.directory / f"{name}.out", "wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [_find(name), *options],
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
