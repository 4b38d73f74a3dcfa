"""The files under cluster/, each judged by something that did not write it.

`ray up` configurations by Ray's own loader, that of AWS also by an EC2 API that starts its nodes;
the Dockerfile by hadolint; the scripts in the image and the batch script by running them. Slurm and
the image itself take minutes: tests/soaks/slurm.py and tests/soaks/image.py.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from ganscale.checkpoint import CheckpointStore
from tests.conftest import MakeConfig

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CONFIGURATIONS = ("aws", "gcp", "onprem")

needs_hadolint = pytest.mark.skipif(
    shutil.which("hadolint") is None, reason="NOT CHECKED: hadolint is not here"
)


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    return loaded


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` reads it: defaults filled in, the schema and the node types checked."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    return whole


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_ray_up_takes_the_configuration(name: str) -> None:
    whole = prepared(read(name))
    head = whole["available_node_types"][whole["head_node_type"]]
    assert head["resources"] == ({"CPU": 0} if name != "onprem" else {})
    for commands in (whole["head_start_ray_commands"], whole["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
    assert any(path.endswith("/.ray/auth_token") for path in whole["file_mounts"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clustername": "x"}, "'clustername' was unexpected"),
        ({"head_node_type": "nope"}, "must be one of `available_node_types`"),
        ({"max_workers": "many"}, "'many' is not of type 'integer'"),
        ({"provider": {"region": "us-west-2"}}, "type"),
        ({"head_start_ray_commands": "ray start"}, "'ray start' is not of type 'array'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_ray_up_refuses_a_broken_one(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        prepared({**read("aws"), **changes})


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_image_is_that_of_the_pinned_ray(name: str) -> None:
    pins = (ROOT / "constraints.txt").read_text().split()
    version = read(name)["docker"]["image"].rpartition(":")[2]
    assert f"ray=={version}" in pins


@pytest.fixture
def ec2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an EC2 API on this machine, where Ray finds it too."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a key pair to ~/.ssh
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    client = boto3.client("ec2")
    yield client
    client.close()
    moto.stop()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_ray_starts_the_nodes_of_the_aws_configuration(ec2: Any) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    config = bootstrap_aws(prepared(read("aws")))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    types = {name: kind["node_config"] for name, kind in config["available_node_types"].items()}
    with pytest.raises(NodeLaunchException, match="Instance profile ganscale not found"):
        provider.create_node(types["workers"], {}, 1)
    iam = boto3.client("iam")
    iam.create_instance_profile(InstanceProfileName="ganscale")
    iam.close()
    for node_config in types.values():
        provider.create_node(node_config, {}, 1)
    found = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    kinds = {(i["InstanceType"], i.get("InstanceLifecycle", "")) for i in found}
    assert kinds == {("m6i.xlarge", ""), ("p4d.24xlarge", "spot")}
    provider.terminate_nodes([i["InstanceId"] for i in found])


@needs_hadolint
def test_hadolint_has_nothing_against_the_dockerfile(tmp_path: Path) -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert hadolint(CLUSTER / "Dockerfile") == ""
    broken = tmp_path / "Dockerfile"
    for line, changed, rule in (
        ("USER 1000:100", "USER root", "DL3002"),
        ("WORKDIR /home/ray", "WORKDIR ray", "DL3000"),
        ("pip install --no-cache-dir --constraint", "pip install --constraint", "DL3042"),
        ("COPY constraints.txt /tmp/constraints.txt", "ADD constraints.txt /tmp", "DL3020"),
    ):
        assert line in text
        broken.write_text(text.replace(line, changed))
        assert rule in hadolint(broken)


def hadolint(file: Path) -> str:
    done = subprocess.run(["hadolint", str(file)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="NOT CHECKED: stop-training stops all that trains; a container for it needs root",
)
def test_stop_training_ends_the_run_of_its_container_at_a_checkpoint(
    make_config: MakeConfig,
) -> None:
    config = make_config(training__total_kimg=1000.0)
    file = config.run_dir.parent / "tiny.yaml"
    file.write_text(config.to_yaml())
    metrics, stop = config.run_dir / "metrics.jsonl", CLUSTER / "image" / "stop-training"
    inside = f"""
        {sys.executable} -m ganscale train --config {file} > /dev/null 2>&1 &
        run=$!
        until [ -s {metrics} ]; do kill -0 $run || exit 1; sleep 0.1; done
        {sys.executable} {stop} --wait 60
        echo "stopped $?"
        wait $run
        echo "ended $?"
        {sys.executable} {stop}
        echo "nothing to stop $?"
    """
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run(
        [*container, "bash", "-c", inside], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.stdout.splitlines() == ["stopped 0", "ended 143", "nothing to stop 0"], done.stderr
    (newest, *_) = CheckpointStore(config.checkpoints).lineage()
    assert newest.nimg > 0


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="NOT CHECKED: scripts need shellcheck"
)
def test_scripts_are_as_shellcheck_wants_them() -> None:
    scripts = [CLUSTER / "slurm" / "train.sbatch", *(CLUSTER.parent / "scripts").glob("*.sh")]
    assert len(scripts) == 4
    options = ["--shell", "bash", "--severity", "warning"]
    subprocess.run(["shellcheck", *options, *map(str, scripts)], check=True)


def test_settings_of_nccl_are_ones_that_bash_reads() -> None:
    settings = subprocess.run(
        ["bash", "-c", f"set -aeu; . {CLUSTER / 'nccl.env'}; env"],
        capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]},
    ).stdout.splitlines()  # fmt: skip
    assert {"NCCL_DEBUG=WARN", "TORCH_NCCL_ASYNC_ERROR_HANDLING=1"} <= set(settings)


FAKES = {
    # A step of one node: what it is to run, which gets the step's signals as a whole.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        setsid "$@" & step=$!
        trap 'kill -TERM -- -$step' TERM
        wait; wait""",
    "ray": """
        [ "$1" = start ] || exit 0
        for option; do case $option in --temp-dir=*) folder=${option#*=} ;; esac; done
        mkdir -p "$folder/session_1" && echo "$folder" > "$RECORD" && sleep 60""",
    "python": """
        [ "$1" = -c ] && echo token && exit
        while [ ! -s "$RECORD" ]; do sleep 0.05; done
        ls -d "$(cat "$RECORD")"/session_1 && exit 7""",
    "scontrol": "echo NodeAddr=127.0.0.1",
    "ip": "echo 1: lo",
}


def test_the_folder_of_ray_is_the_job_s_own_and_is_removed(tmp_path: Path) -> None:
    """In /tmp itself: a folder of all jobs there would belong to the first user of the node."""
    for name, fake in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{fake}\n")
        (tmp_path / name).chmod(0o755)
    job, record = str(os.getpid()), tmp_path / "folder"
    values = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RECORD": str(record),
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NAME": "ganscale",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_NNODES": "1",
        "SLURMD_NODENAME": "left",
    }
    (tmp_path / "cluster").symlink_to(CLUSTER)
    script = ["bash", str(CLUSTER / "slurm" / "train.sbatch")]
    done = subprocess.run(
        script, capture_output=True, text=True, env=values, check=False, timeout=60
    )
    folder = Path(record.read_text().strip())
    assert done.returncode == 7, done.stderr
    assert done.stdout == f"{folder}/session_1\n"  # it was there while the run trained
    assert folder.parent == Path("/tmp")
    assert job in folder.name
    assert not folder.exists()
