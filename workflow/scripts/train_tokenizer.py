"""The tokenizer of the small base models."""

from pathlib import Path

from greencode import job
from greencode.pretrain import build_tokenizer


def main(smk):
    block = smk.params.pretrain
    build_tokenizer(
        block["corpus"],
        block["vocabulary"],
        block["tokenizer_files"],
        block["context"],
        Path(smk.output[0]).parent,
        block["held_back"],
    )


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
