"""A base model, bundled, local or from the hub, checked and copied to where the other rules expect it."""

from pathlib import Path

from greencode import job
from greencode.models import fetch


def main(smk):
    fetch(smk.params.model, Path(smk.output.info).parent)


if __name__ == "__main__":
    job.run(main, snakemake, online=True)  # noqa: F821
