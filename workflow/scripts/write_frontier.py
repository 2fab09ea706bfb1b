"""The frontier of every model and dataset as tables, and in words."""

from greencode import job, tables
from greencode.files import read_json, write_text


def main(smk):
    records = [read_json(path) for path in smk.input]
    for name in ("points", "summaries", "tests", "calibration"):
        tables.write_table(tables.frontier_table(records, name), smk.output[name])
    tables.write_table(tables.frontier_seeds(records), smk.output.seeds)
    write_text(smk.output.words, tables.frontier_words(records))


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
