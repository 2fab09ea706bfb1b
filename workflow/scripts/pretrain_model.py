"""One small base model from scratch."""

import shutil
from pathlib import Path

from greencode import job
from greencode.energy import Meter
from greencode.files import sha256
from greencode.models import pick_device
from greencode.pretrain import train_model
from greencode.results import config_hash


def main(smk):
    block, shape = dict(smk.params.pretrain) | {"seed": smk.params.seed}, smk.params.shape
    out = Path(smk.output.weights).parent
    key = config_hash([shape, block, smk.params.code, sha256(smk.input.blocks), sha256(smk.input.tokenizer)])
    checkpoints = out / "checkpoints" / key
    tokenizer = Path(smk.input.tokenizer).parent
    train_model(
        shape, block, smk.input.blocks, tokenizer, checkpoints, out, smk.threads, smk.params.watts or None
    )
    shutil.rmtree(out / "checkpoints")


if __name__ == "__main__":
    meter = Meter.open(pick_device("auto"), allow=["nvml"])
    job.run(main, snakemake, meter=meter)  # noqa: F821
