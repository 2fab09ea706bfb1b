"""Weighted multi-exit fine-tuning of one model on one dataset."""

import shutil
from pathlib import Path

from greencode import job
from greencode.corpus import read_split
from greencode.energy import Meter
from greencode.files import sha256
from greencode.finetune import finetune, training_blocks
from greencode.launch import launch
from greencode.models import pick_device
from greencode.results import config_hash
from greencode.tokenise import load_tokenizer


def main(smk):
    block = smk.params.finetune
    base, out = Path(smk.input.base).parent, Path(smk.output.weights).parent
    tokenizer = load_tokenizer(base)
    train = training_blocks(tokenizer, read_split(smk.input.train), block, block["max_blocks"])
    validation = training_blocks(
        tokenizer, read_split(smk.input.validation), block, block["validation_blocks"]
    )
    made_of = [sha256(path) for path in (smk.input.base, smk.input.train, smk.input.validation)]
    checkpoints = out / "checkpoints" / config_hash([block, smk.params.code, made_of])
    threads = max(smk.threads // block["processes"], 1)
    arguments = {
        "base": base,
        "train": train,
        "validation": validation,
        "settings": block,
        "seed": block["seed"],
        "device": pick_device(block["device"]),
        "threads": threads,
        "checkpoints": checkpoints,
        "out": out,
    }
    if block["launcher"] == "accelerate":
        launch(finetune, arguments, block["processes"], threads, checkpoints)
    else:
        finetune(**arguments)
    shutil.rmtree(out / "checkpoints")


if __name__ == "__main__":
    # The CPU's counters would count the job beside this one too.
    meter = Meter.open(pick_device(snakemake.params.finetune["device"]), allow=["nvml"])  # noqa: F821
    job.run(main, snakemake, meter=meter)  # noqa: F821
