"""Source code -> CodeXGLUE tokens, split by file, with a manifest."""

from pathlib import Path

from greencode import job
from greencode.corpus import SPLITS, prepare
from greencode.files import read_json


def main(smk):
    block = smk.params.dataset
    source = read_json(smk.input.fetched)["source"] if smk.input.fetched else block["source"]
    prepare(
        source,
        block["language"],
        block["variant"],
        block["seed"],
        dict(zip(SPLITS, block["fractions"], strict=True)),
        {split: limit or None for split, limit in block["max_files"].items()},
        block["min_tokens"],
        out_dir=Path(smk.output.manifest).parent,
        cache_dir="resources/downloads",
    )


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
