"""One small base model from scratch."""

import shutil
from pathlib import Path

from greencode import job
from greencode.pretrain import train_model
from greencode.results import config_hash


def main(smk):
    block, shape = dict(smk.params.pretrain) | {"seed": smk.params.seed}, smk.params.shape
    out = Path(smk.output.weights).parent
    checkpoints = out / "checkpoints" / config_hash([shape, block, smk.params.code])
    tokenizer = Path(smk.input.tokenizer).parent
    train_model(
        shape, block, smk.input.blocks, tokenizer, checkpoints, out, smk.threads, smk.params.watts or None
    )
    shutil.rmtree(out / "checkpoints")


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
