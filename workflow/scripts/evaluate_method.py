"""Scores of one method, with intervals."""

from greencode import job
from greencode.evaluate import evaluate
from greencode.results import Generation


def main(smk):
    block = smk.params.evaluate
    evaluate(Generation.read(smk.input[0]), block["seed"], block["resamples"]).write(smk.output[0])


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
