"""Build the image with buildah on a stand-in for Ray's own, and train in it as a pod would.

    sudo -E python -m tests.soaks.image --shards data/cifar10-train --volume /etc/ssl/certs

The stand-in is a small Debian with Python 3.11 in a virtual environment where Ray's image has its
conda, and the user `ray` (1000): it proves the steps of cluster/Dockerfile, not CUDA nor Ray's
image. Then, as under k8s/: user 1000, no privileges to be gained, a read-only root, only /tmp,
/dev/shm and /runs to be written, HOME=/tmp: ganscale trains two workers under Ray, its checkpoints
verify, and the image's scripts run. `--volume` makes more of this machine visible to the build, say
what pip needs. Needs Linux, root, Debian's packages buildah and debootstrap, ten gigabytes and as
many minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("buildah", "debootstrap", "unshare", "setpriv")
VENV = "/home/ray/anaconda3"
BASE = "rayproject/ray:2.60.0-py311"
IMAGE = "localhost/ganscale-cpu:2.60.0"


def main() -> None:
    """Build and train; exit code 1 if a step fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, required=True, help="Folder of a shard set.")
    parser.add_argument("--storage", type=Path, default=Path("runs/image"), help="Of images.")
    parser.add_argument("--volume", action="append", default=[], help="For the build, read-only.")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("building without an engine needs root: sudo -E python -m tests.soaks.image ...")
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        sys.exit(f"{', '.join(missing)} missing: apt-get install buildah debootstrap")
    storage = arguments.storage.absolute()
    storage.mkdir(parents=True, exist_ok=True)
    volumes = [option for path in arguments.volume for option in ("-v", f"{path}:{path}:ro")]
    if BASE not in buildah(storage, "images", "--format", "{{.Name}}:{{.Tag}}"):
        timed("the stand-in for Ray's image", lambda: make_base(storage, volumes))
    options = ["--pull=never", "--isolation=chroot", "--network=host", *volumes]
    build = ["bud", *options, "-f", str(ROOT / "cluster" / "Dockerfile"), "-t", IMAGE, str(ROOT)]
    timed("the image", lambda: buildah(storage, *build, show=True))
    container = buildah(storage, "from", "--pull=never", IMAGE)
    root = Path(buildah(storage, "mount", container))
    print(f"{container} has {size(root):.1f} GB", flush=True)
    timed("training in it", lambda: train(root, storage, arguments.shards.absolute()))
    buildah(storage, "rm", container)


def timed(what: str, step: Callable[[], object]) -> None:
    """Run a step and say how long it took."""
    began = time.monotonic()
    print(f"{what} ...", flush=True)
    step()
    print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)


def buildah(storage: Path, *words: str, show: bool = False) -> str:
    """What a command of buildah says, with images in a folder of our own."""
    places = ["--storage-driver=vfs", f"--root={storage}/images", f"--runroot={storage}/run"]
    done = subprocess.run(
        ["buildah", *places, *words],
        check=True,
        text=True,
        stdout=None if show else subprocess.PIPE,
    )
    return (done.stdout or "").strip()


def make_base(storage: Path, volumes: list[str]) -> None:
    """Debian with what the Dockerfile expects of Ray's image, tagged as it is."""
    base = storage / "base"
    packages = "--include=python3,python3-venv,ca-certificates,procps"
    subprocess.run(
        ["debootstrap", "--variant=minbase", packages, "bookworm", str(base)], check=True
    )
    container = buildah(storage, "from", "--pull=never", "scratch")
    buildah(storage, "add", container, str(base), "/")
    setup = f"useradd --uid 1000 --gid 100 --create-home ray && su ray -c 'python3 -m venv {VENV}'"
    run = ["run", "--isolation=chroot", *volumes, container, "--", "sh", "-c", setup]
    buildah(storage, *run)
    settings = [f"--env=PATH={VENV}/bin:/usr/local/bin:/usr/bin:/bin", "--user=ray"]
    buildah(storage, "config", *settings, "--workingdir=/home/ray", container)
    buildah(storage, "commit", container, BASE)
    buildah(storage, "rm", container)
    shutil.rmtree(base)


def size(root: Path) -> float:
    """Gigabytes of a file system."""
    words = subprocess.run(["du", "-sb", str(root)], check=True, capture_output=True, text=True)
    return int(words.stdout.split()[0]) / 1e9


def train(root: Path, storage: Path, shards: Path) -> None:
    """In a namespace of its own, with what a pod of k8s/ has and no more."""
    runs = storage / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir()
    os.chown(runs, 1000, 100)
    confined = (
        f"chroot --userspec=1000:100 {root} env -i HOME=/tmp WANDB_MODE=disabled "
        f"PATH={VENV}/bin:/usr/local/bin:/usr/bin:/bin"
    )
    commands = (
        "sh -c 'touch /home/ray/x 2>&1 | grep -q Read-only && id -u'",
        "python -m ganscale train --config quickstart name=image storage=/runs data.shards=/shards "
        "training.total_kimg=2 launch.num_workers=2",
        "python -m ganscale checkpoint verify /runs/image",
        "stop-training",
    )
    script = f"""
        set -e
        mount --bind {root} {root}
        mkdir -p {root}/runs {root}/shards {root}/dev/shm
        mount --rbind /dev {root}/dev && mount -t proc proc {root}/proc
        mount --bind {runs} {root}/runs
        mount --bind -o ro {shards} {root}/shards
        mount -t tmpfs tmpfs {root}/tmp && chmod 1777 {root}/tmp
        mount -o remount,bind,ro {root}
        ip link set lo up
    """
    script += "\n".join(f"{confined} setpriv --no-new-privs {command}" for command in commands)
    subprocess.run(
        ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "bash", "-c", script],
        check=True,
    )


if __name__ == "__main__":
    main()
