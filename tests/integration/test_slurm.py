"""The small study through sbatch, on a Slurm of one node that begins and ends with these tests."""

import copy
import itertools
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import small_study
import yaml
from small_study import prepare

from greencode.files import read_json
from greencode.results import Evaluation

pytestmark = pytest.mark.slurm
# A fine-tuning so long that scancel finds it at work, however slow the machine.
CONFIG = copy.deepcopy(small_study.CONFIG)
CONFIG["finetune"]["max_blocks"] = 100
# One file's tokens fill no block: no check of the configuration can know, the job finds out.
FAILING = copy.deepcopy(CONFIG)
FAILING["data"]["max_files"] = {"train": 1}
FAILING["finetune"]["sequence_length"] = 1024
RUN = ("--workflow-profile", "profiles/slurm", "figures")
WEIGHTS = "models/tiny/code/model.safetensors"

SLURM = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# squeue is asked for jobs that have ended.
MinJobAge=3600
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000
PartitionName=tests Nodes=ALL Default=YES
"""

# Runs in namespaces of its own for processes and mounts: the configuration lies at its default place, where
# the plugin's job steps look for it, and yet the machine's /etc/slurm stays as it is; and when the command
# given to it ends, the kernel ends the daemons and every job.
INSIDE = """
cd "$0"
mount --bind . /etc/slurm
munged --force --key-file="$0/munge.key" --socket="$0/munge.socket" --pid-file="$0/munged.pid" \
    --log-file="$0/munged.log" --seed-file="$0/munged.seed"
slurmctld
slurmd
"$@"
"""
# The plugin asks for its jobs after 1, 11, 21, ... seconds and has no setting for it: most of a test would be
# waiting.
ASKING = """
from snakemake_executor_plugin_slurm import Executor
Executor.next_seconds_between_status_checks = property(lambda self: 2, lambda self, seconds: None)
"""
# Ended with the tests, even if these are killed.
NAMESPACES = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--mount-proc", "--kill-child")


def missing():
    """Why there can be no Slurm here, or None."""
    if os.geteuid() != 0:
        return "only root can start Slurm's daemons"
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv")
    if absent := [name for name in programs if not shutil.which(name)]:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)"
    if not Path("/etc/slurm").is_dir():
        return "this Slurm does not read its configuration from /etc/slurm"
    if subprocess.run([*NAMESPACES, "true"], capture_output=True).returncode != 0:
        return "namespaces are not permitted here"
    return None


def free_ports(number):
    """TCP ports that nothing listens to."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in listening]
    for one in listening:
        one.close()
    return ports


class Cluster:
    """Slurm's commands, and studies that run on it."""

    def __init__(self, folder, new_study):
        self.folder, self.new_study = folder, new_study

    def run(self, *command):
        """What a command of Slurm prints."""
        environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def is_up(self):
        """Whether the node takes jobs."""
        try:
            return self.run("sinfo", "--noheader", "--format=%T").strip() == "idle"
        except AssertionError:
            return False

    def jobs(self):
        """Every job so far, the oldest first, as scontrol shows it."""
        lines = self.run("scontrol", "--oneliner", "show", "jobs").splitlines()
        jobs = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if line.startswith("JobId=")]
        return sorted(jobs, key=lambda job: int(job["JobId"]))


@pytest.fixture(scope="module")
def cluster(studies, tmp_path_factory):
    """A Slurm of one node, ended with all its processes whatever happens."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(SLURM.format(host=host, folder=folder, ports=free_ports(2)))
    with studies(*NAMESPACES, "sh", "-ec", INSIDE, str(folder), first=ASKING) as new_study:
        cluster, end = Cluster(folder, new_study), time.monotonic() + 60
        while not cluster.is_up():
            if time.monotonic() > end:
                logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
                pytest.skip(f"Slurm is installed and does not start on this machine:\n{logs[-2000:]}")
            time.sleep(0.1)
        yield cluster


@pytest.fixture(scope="module")
def clustered(cluster):
    """The small study with the profile as a user of this cluster would edit it."""
    study = prepare(cluster.new_study("clustered"))
    path = study.folder / "profiles/slurm/profile.yaml"
    profile = yaml.safe_load(path.read_text())
    profile["default-resources"]["slurm_partition"] = "tests"
    del profile["default-resources"]["slurm_account"]
    profile |= {"slurm-status-command": "squeue", "latency-wait": 5}
    path.write_text(yaml.safe_dump(profile))
    return study


@pytest.fixture(scope="module")
def failed(clustered):
    """A run whose fine-tuning cannot be done."""
    clustered.configure(FAILING)
    return clustered.snakemake(*RUN, cores=None)


@pytest.fixture(scope="module")
def cancelled(cluster, clustered, failed):
    """A run whose fine-tuning was ended by scancel after its first checkpoint."""
    clustered.configure(CONFIG)
    runs = []
    run = threading.Thread(target=lambda: runs.append(clustered.snakemake(*RUN, cores=None)))
    run.start()
    while not any(
        clustered.folder.glob("results/models/tiny/code/checkpoints/*/checkpoint-*/trainer_state.json")
    ):
        assert run.is_alive(), runs[0].stderr
        time.sleep(0.01)
    cluster.run("scancel", "--user=root", "--state=running")
    run.join()
    return runs[0]


@pytest.fixture(scope="module")
def finished(cancelled, clustered):
    """The same command once more."""
    assert not (clustered.folder / "results" / WEIGHTS).exists()
    done = clustered.snakemake(*RUN, cores=None)
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def test_a_failing_rule_is_reported_with_its_log_and_one_sentence(failed):
    assert failed.returncode != 0
    assert re.search(r"^ *Only \d+ training tokens, fewer than one sequence of 1024: ", failed.stderr, re.M)
    assert "logs/finetune_model/tiny/code.log" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_cancelled_job_ends_the_run(cancelled):
    assert cancelled.returncode != 0
    assert "CANCELLED" in cancelled.stderr


def test_the_same_command_goes_on_from_the_checkpoint_to_every_figure(finished, clustered):
    assert "Going on from checkpoint-" in (clustered.folder / "logs/finetune_model/tiny/code.log").read_text()
    assert (clustered.folder / "results/figures/fig08_tiny_code.pdf").read_bytes().startswith(b"%PDF")
    assert "Nothing to be done" in clustered.snakemake(*RUN, cores=None).stderr


def test_the_results_are_those_of_a_run_without_a_cluster(finished, clustered, new_study):
    scores = [
        str(path.relative_to(clustered.folder)) for path in clustered.folder.glob("results/evaluation/*/*/*")
    ]
    assert len(scores) > 4
    alone = prepare(new_study("alone"))
    alone.configure(CONFIG)
    done = alone.snakemake(*scores)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in (WEIGHTS, "agents/tiny/code/agent/policy.safetensors"):
        assert (clustered.folder / "results" / name).read_bytes() == (
            alone.folder / "results" / name
        ).read_bytes()
    for name in scores:
        there, here = (Evaluation.read(one.folder / name) for one in (clustered, alone))
        assert (there.quality, there.depth_counts) == (here.quality, here.depth_counts)


def test_measurements_are_one_job_alone_on_its_node_one_after_another(finished, cluster, clustered):
    jobs = [job for job in cluster.jobs() if "measure_tiny_code" in job["Comment"]]
    assert len(jobs) == 1
    (job,) = jobs
    assert (job["OverSubscribe"], job["NumCPUs"], job["CPUs/Task"]) == ("NO", "2", "1")
    results = clustered.folder / "results"
    weights = (results / "models/tiny/base/model.safetensors").stat().st_size
    assert job["MinMemoryNode"] == f"{4000 + 3 * weights // 10**6}M"  # and the memory of one
    costs = [path for path in clustered.folder.glob("logs/*/tiny/**/*.json") if is_measured(path)]
    spans = sorted(
        (path.stat().st_mtime - read_json(path)["seconds"], path.stat().st_mtime) for path in costs
    )
    assert len(spans) > 4
    assert job["TimeLimit"] == f"{len(spans):02}:00:00"  # an hour each
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end <= start


def is_measured(path):
    """Whether a job, by the record of its cost, measured something."""
    return read_json(path)["rule"].startswith(("generate_", "measure_"))


def test_a_run_is_few_jobs(finished, cluster):
    """Two fine-tunings did not succeed; the rest went through, with one job for each group."""
    jobs = [(job["JobState"], job["Comment"]) for job in cluster.jobs()]
    states = [state for state, _ in jobs]
    assert states == ["FAILED", "CANCELLED"] + ["COMPLETED"] * (len(jobs) - 2), jobs
    for group in ("measure", "score", "report"):
        assert len([comment for _, comment in jobs if comment.startswith(f"rule_{group}_")]) == 1, jobs
