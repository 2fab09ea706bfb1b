"""The training corpus as one array of packed token blocks."""

from pathlib import Path

from greencode import job
from greencode.pretrain import build_blocks


def main(smk):
    block = smk.params.pretrain
    tokenizer = Path(smk.input.tokenizer).parent
    build_blocks(
        block["corpus"], tokenizer, block["context"], block["tokens"], smk.params.seed, smk.output[0]
    )


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
