"""A dataset's source, brought to this machine and hashed, so that all later work needs no network."""

from greencode import job
from greencode.corpus import fetch
from greencode.files import write_json


def main(smk):
    source = dict(smk.params.source)
    write_json(smk.output[0], fetch(source, source.pop("language"), "resources/downloads"))


if __name__ == "__main__":
    job.run(main, snakemake, online=True)  # noqa: F821
