"""Completions of train files, a share of them written by an agent, seen from every exit."""

from pathlib import Path

from greencode import job
from greencode.energy import Meter
from greencode.engine import OBSERVATION, Engine
from greencode.models import fingerprint, load, pick_device
from greencode.policies import ExitPolicy
from greencode.trajectories import Along, record_split


def main(smk):
    import torch

    block, along = smk.params.trajectories, smk.params.along
    torch.set_num_threads(smk.threads)
    directory = Path(smk.input.weights).parent
    engine = Engine(load(directory, pick_device(block["device"])), block["exit_points"])
    agent = ExitPolicy.load(smk.input.policy, fingerprint(directory), engine.exit_points, OBSERVATION)
    text = Along(agent, along["threshold"], along["share"])
    record_split(engine, directory, smk.input.train, "train", block, text).save(smk.output.train)


if __name__ == "__main__":
    # The CPU's counters would count the job beside this one too.
    meter = Meter.open(pick_device(snakemake.params.trajectories["device"]), allow=["nvml"])  # noqa: F821
    job.run(main, snakemake, meter=meter)  # noqa: F821
