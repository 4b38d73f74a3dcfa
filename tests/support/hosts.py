"""Hosts on this machine, in Linux namespaces on one switch, with a Ray cluster on them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import psutil

PORT = 6379
RAY_ADDRESS = f"10.77.0.1:{PORT}"
"""Of the cluster, from any of the hosts."""
DASHBOARD = "http://10.77.0.1:8265"
"""Of the cluster, from any of the hosts, if it is to take jobs."""
DISK = "/tmp/ganscale-disk"
"""On each host, a folder of its own; from outside it is `host.disk`."""
_AGENT_PORTS = (  # given, since Ray's daemon waits 15 s for those that its agents choose, then dies
    "--dashboard-agent-listen-port=52365 --dashboard-agent-grpc-port=52366 "
    "--metrics-export-port=52367 --runtime-env-agent-port=52368"
)

HEALTH_CHECKS = {  # of Ray's head: a host that is silent for 5 to 8 s is given up
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Host:
    """A host with its own network, processes, name, disk and /tmp/ray; all ends with the block.

    Its first process waits for the end of its input, which comes even when this script is killed;
    the kernel then ends the others and takes away the interfaces.
    """

    def __init__(self, name: str, number: int, folder: Path) -> None:
        self.name = name
        self.address = f"10.77.0.{number}"
        self.port = f"port{number}"
        self.folder = folder / name
        self.disk = self.folder / "disk"

    def __enter__(self) -> Self:
        setup = f"set -e; hostname {self.name}; ip link set lo up"
        for own, path in ((self.folder / "ray", "/tmp/ray"), (self.disk, DISK)):
            own.mkdir(parents=True)
            Path(path).mkdir(exist_ok=True)
            setup += f"; mount --bind {own} {path}"
        namespaces = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            ["unshare", *namespaces, "--mount-proc", "bash", "-c", f"{setup}; echo up; read"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError(f"no namespaces for {self.name}: they need Linux and root")
        (first,) = psutil.Process(self._process.pid).children()
        self.pid = first.pid
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, command: str) -> None:
        """Run a command here and wait for it."""
        subprocess.run([*self._enter(), *command.split()], check=True)

    def start(self, command: list[str], log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command here; its output goes to a file in the host's folder."""
        network = {"GLOO_SOCKET_IFNAME": "eth0", "RAY_worker_niceness": "0"}
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(
                [*self._enter(), *command],
                env={**os.environ, "RAY_AUTH_MODE": "disabled", **network, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self, title: str) -> list[psutil.Process]:
        """Those that run here with `title` in their command line."""
        here = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                same = os.readlink(f"/proc/{process.pid}/ns/pid") == here
                if same and title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def _enter(self) -> list[str]:
        flags = ["--net", "--mount", "--uts", "--ipc", "--pid"]
        return ["nsenter", "--target", str(self.pid), *flags]


class Network:
    """Hosts on a switch, with a Ray cluster on them while the block runs.

    It takes jobs from those who have `token`, if that is given.
    """

    def __init__(self, folder: Path, *, spare: bool, token: str = "") -> None:
        self._token = token
        self.switch = Host("switch", 9, folder)
        names = ["head", "left", "right", *(["spare"] if spare else [])]
        self.head, *self.nodes = [Host(name, i, folder) for i, name in enumerate(names, 1)]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack:  # which ends the hosts if one of them does not start
            self._connect()
            self._start_ray()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def set_link(self, host: Host, state: str) -> None:
        """Pull the host's cable out of the switch (`down`), or put it back (`up`)."""
        self.switch.run(f"ip link set {host.port} {state}")

    def attach(self, address: str) -> None:
        """Connect this process, which must have a network of its own, to the switch."""
        pair = f"ip link add eth0 netns {os.getpid()} type veth peer name port0"
        for command in (
            [*pair.split(), "netns", str(self.switch.pid)],
            f"ip addr add {address}/24 dev eth0".split(),
            ["ip", "link", "set", "eth0", "up"],
        ):
            subprocess.run(command, check=True)
        self.switch.run("ip link set port0 master br0 up")

    def _connect(self) -> None:
        self._stack.enter_context(self.switch)
        self.switch.run("ip link add br0 type bridge")
        self.switch.run("ip link set br0 up")
        for host in (self.head, *self.nodes):
            self._stack.enter_context(host)
            pair = f"ip link add eth0 netns {host.pid} type veth peer name {host.port}"
            subprocess.run([*pair.split(), "netns", str(self.switch.pid)], check=True)
            self.switch.run(f"ip link set {host.port} master br0 up")
            host.run(f"ip addr add {host.address}/24 dev eth0")
            host.run("ip link set eth0 up")

    def _start_ray(self) -> None:
        common = f"--object-store-memory=100000000 --block {_AGENT_PORTS}"
        dashboard = "true --dashboard-host=0.0.0.0" if self._token else "false"
        head = f"--head --port={PORT} --num-cpus=0 --include-dashboard={dashboard}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token} if self._token else {}
        node = f"--address={RAY_ADDRESS} --num-cpus=1"
        for host in (self.head, *self.nodes):
            options = head if host is self.head else node
            command = (
                f"{sys.executable} -m ray.scripts.scripts start --node-ip-address={host.address} "
                f"{options} {common}"
            )
            # As a service manager does: Ray's daemons end when the head has given them up.
            again = f"while :; do {command}; sleep 1; done"
            host.start(["bash", "-c", again], "ray.log", **HEALTH_CHECKS, **token)
            deadline = time.monotonic() + 600
            log = host.folder / "ray.log"
            while "runtime started" not in log.read_text(errors="replace"):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"Ray does not start; see {log}")
                time.sleep(0.2)
