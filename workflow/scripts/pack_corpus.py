"""The training corpus as one array of packed token blocks."""

from pathlib import Path

from greencode import job
from greencode.pretrain import build_blocks


def main(smk):
    block = smk.params.pretrain
    build_blocks(
        block["corpus"],
        Path(smk.input.tokenizer).parent,
        block["context"],
        block["tokens"],
        smk.params.seed,
        smk.output[0],
        block["held_back"],
    )


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
