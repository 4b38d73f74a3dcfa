"""Train under Slurm and requeue in mid-run, twice; the weights must be those of a run left alone.

    sudo -E python -m tests.soaks.slurm --shards data/cifar10-train --kimg 20

A controller and two nodes with a daemon each (slurmctld, slurmd, munged; Debian's packages) on
hosts in network namespaces. cluster/slurm/train.sbatch is submitted with two workers. First the job
gets SIGUSR1 as before its time limit: it checkpoints and goes back into the queue by itself. Then
the administrator requeues it. At the end the sha256 over all tensors is compared with that of an
uninterrupted run of two plain processes. Needs Linux and root.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ganscale.config import Config
from ganscale.run_directory import RunDirectory
from tests.soaks.runs import add_arguments, newest, small_run, train_undisturbed, write_config
from tests.support.hosts import Host, Network
from tests.support.runs import read_rows

ROOT = Path(__file__).parents[2]
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
CONFIGURATION = """
ClusterName=soak
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as the credentials of its steps live, two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
ReturnToService=2
SlurmdTimeout=60
MailProg=/bin/true
NodeName=left NodeAddr=10.77.0.2 CPUs=1
NodeName=right NodeAddr=10.77.0.3 CPUs=1
PartitionName=all Nodes=left,right Default=YES MaxTime=INFINITE State=UP
"""

REQUEUES = {
    "a signal before the time limit": "scancel --signal=USR1 --batch",
    "the administrator": "scontrol requeue",
}


def main() -> None:
    """Parse, run, compare; exit code 1 if the weights differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("network namespaces need root: sudo -E python -m tests.soaks.slurm ...")
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        sys.exit(
            f"{', '.join(missing)} missing: apt-get install slurmctld slurmd slurm-client munge"
        )
    expected = newest(train_undisturbed(arguments))
    config = small_run(arguments, "slurm")
    hosts = config.run_dir.parent / "slurm-hosts"
    for folder in (config.run_dir, hosts):
        if folder.exists():
            sys.exit(f"{folder} exists: remove it, or choose another --storage")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with SlurmNetwork(hosts) as cluster:
        found = _requeued_twice(config, cluster)
    print(f"expected {expected}\nfound    {newest(config)}")
    print(json.dumps(found, indent=1))
    if newest(config) != expected:
        sys.exit("the weights differ")
    print("the weights are bit-identical")


class SlurmNetwork(Network):
    """The hosts of a `Network`, with Slurm on them instead of Ray."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, spare=False)
        self.folder = folder / "slurm"

    def _start_ray(self) -> None:
        state = self.folder / "state"
        state.mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        munge = {
            "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log",
            "seed-file": "munged.seed", "key-file": "munge.key",
        }  # fmt: skip
        options = [f"--{name}={self.folder / file}" for name, file in munge.items()]
        self._daemon(self.head, ["munged", "--foreground", "--force", *options])
        _wait_for("munge", (self.folder / "munge.socket").exists, 30)
        self._daemon(self.head, ["slurmctld", "-D"])
        for host in self.nodes:
            self._daemon(host, ["slurmd", "-D", "-N", host.name])
        _wait_for("two idle nodes", lambda: self.slurm("sinfo -h -o %D%t") == "2idle", 60)

    def slurm(self, command: str) -> str:
        """What a command of Slurm says on the head."""
        environment = ["env", f"--chdir={ROOT}", f"SLURM_CONF={self.folder}/slurm.conf"]
        whole = [*self.head._enter(), *environment, *command.split()]
        return subprocess.run(whole, capture_output=True, text=True).stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.slurm(f"scontrol show job {job}").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _daemon(self, host: Host, command: list[str]) -> None:
        log = f"{command[0]}.log"
        host.start(command, log, SLURM_CONF=str(self.folder / "slurm.conf"))


def _requeued_twice(config: Config, cluster: SlurmNetwork) -> dict[str, object]:
    """Seconds from each requeue to the next row, and how the attempts began."""
    output = cluster.folder / "job.out"
    options = f"--nodes=2 --cpus-per-task=1 --output={output} --parsable"
    script = f"cluster/slurm/train.sbatch --config {write_config(config)}"
    job = cluster.slurm(f"sbatch {options} {script}")
    print(f"job {job}", flush=True)
    seconds = {}
    for number, what in enumerate(REQUEUES, start=1):
        _wait_for_rows(config, cluster, job, attempt=number)
        began = time.monotonic()
        cluster.slurm(f"{REQUEUES[what]} {job}")
        _wait_for_rows(config, cluster, job, attempt=number + 1)
        seconds[what] = round(time.monotonic() - began, 1)
        print(f"{what}: trains again after {seconds[what]} s", flush=True)
    ended = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
    _wait_for("the end", lambda: cluster.state(job)["JobState"] in ended, 3600)
    state = cluster.state(job)
    if state["JobState"] != "COMPLETED":
        sys.exit(f"the job ended as {state['JobState']}; see {output}")
    events = read_rows(RunDirectory(config.run_dir).events)
    starts = [(e["event"], e["nimg"]) for e in events if e["event"] in ("start", "resume")]
    return {"restarts": state["Restarts"], "seconds": seconds, "attempts": starts}


def _wait_for_rows(config: Config, cluster: SlurmNetwork, job: str, attempt: int) -> None:
    """Until that attempt has logged some rows."""

    def some() -> bool:
        if cluster.state(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"):
            sys.exit(f"the job has ended too early; see {cluster.folder}/job.out")
        rows = read_rows(RunDirectory(config.run_dir).metrics)
        return len([row for row in rows if row["attempt"] >= attempt]) > 20

    _wait_for(f"rows of attempt {attempt}", some, 1800)


def _wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(KeyError):
            if condition():
                return
        if time.monotonic() > deadline:
            sys.exit(f"{what} did not come within {seconds:g} s")
        time.sleep(0.5)


if __name__ == "__main__":
    main()
