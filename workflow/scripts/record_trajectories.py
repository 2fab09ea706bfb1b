"""Completions of train and validation files, seen from every exit."""

from pathlib import Path

from greencode import job
from greencode.corpus import read_split
from greencode.energy import Meter
from greencode.engine import Engine
from greencode.models import fingerprint, load, pick_device
from greencode.tokenise import encode, load_tokenizer
from greencode.trajectories import Draw, record


def main(smk):
    import torch

    block = smk.params.trajectories
    torch.set_num_threads(smk.threads)
    directory = Path(smk.input.weights).parent
    engine = Engine(load(directory, pick_device(block["device"])), block["exit_points"])
    tokenizer = load_tokenizer(directory)
    draw = Draw(**{key: block[key] for key in ("low", "high", "max_context", "min_context", "new_tokens")})
    for number, split in enumerate(("train", "validation")):
        records = read_split(smk.input[split])
        record(
            engine,
            list(encode(tokenizer, (one.code for one in records))),
            [one.id for one in records],
            block[f"{split}_episodes"],
            draw,
            block["seed"] + number,
            block["batch_size"],
            fingerprint(directory),
            split,
        ).save(smk.output[split])


if __name__ == "__main__":
    # The CPU's counters would count the job beside this one too.
    meter = Meter.open(pick_device(snakemake.params.trajectories["device"]), allow=["nvml"])  # noqa: F821
    job.run(main, snakemake, meter=meter)  # noqa: F821
