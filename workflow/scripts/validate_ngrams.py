"""Validation quality of a 5-gram model of the training corpus."""

from pathlib import Path

from greencode import job
from greencode.validate import validate_ngrams


def main(smk):
    block = dict(smk.params.pretrain) | {"seed": smk.params.seed}
    validate_ngrams(smk.input.blocks, Path(smk.input.tokenizer).parent, block, smk.output[0])


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
