"""Completions of train and validation files, seen from every exit."""

from pathlib import Path

from greencode import job
from greencode.energy import Meter
from greencode.engine import Engine
from greencode.models import load, pick_device
from greencode.trajectories import record_split


def main(smk):
    import torch

    block = smk.params.trajectories
    torch.set_num_threads(smk.threads)
    directory = Path(smk.input.weights).parent
    engine = Engine(load(directory, pick_device(block["device"])), block["exit_points"])
    for split in ("train", "validation"):
        record_split(engine, directory, smk.input[split], split, block).save(smk.output[split])


if __name__ == "__main__":
    # The CPU's counters would count the job beside this one too.
    meter = Meter.open(pick_device(snakemake.params.trajectories["device"]), allow=["nvml"])  # noqa: F821
    job.run(main, snakemake, meter=meter)  # noqa: F821
