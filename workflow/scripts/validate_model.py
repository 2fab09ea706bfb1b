"""Validation quality of one small base model, and its model card."""

from pathlib import Path

from greencode import job
from greencode.files import write_text
from greencode.validate import model_card, validate_model


def main(smk):
    block = dict(smk.params.pretrain) | {"seed": smk.params.seed}
    folder = Path(smk.input.weights).parent
    validate_model(folder, block, smk.input.ngrams, smk.threads, smk.output.quality)
    write_text(smk.output.card, model_card(folder, smk.wildcards.shape, block["corpus"]))


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
