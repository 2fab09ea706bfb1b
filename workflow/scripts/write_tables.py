"""Every table as CSV, and the summary as Markdown for the README."""

from greencode import job, tables
from greencode.files import read_json, write_text
from greencode.results import Evaluation


def main(smk):
    evaluations = [Evaluation.read(path) for path in smk.input.evaluations]
    manifests = dict(zip(smk.params.datasets, map(read_json, smk.input.manifests), strict=True))
    models = [
        {"name": name, **read_json(path)}
        for name, path in zip(smk.params.models, smk.input.models, strict=True)
    ]
    learning = [read_json(path) for path in smk.input.learning]
    overheads = [read_json(path) for path in smk.input.overheads]
    published = tables.read_published(smk.input.published)
    summary = tables.summary(evaluations)
    for name, table in {
        "table1_datasets": tables.table1_datasets(manifests),
        "table2_models": tables.table2_models(models),
        "table3_ppo": tables.table3_ppo(learning),
        "table4_overhead": tables.table4_overhead(evaluations, overheads, published),
        "summary": summary,
        "all_results": tables.all_results(evaluations),
    }.items():
        tables.write_table(table, smk.output[name])
    write_text(smk.output.markdown, tables.summary_markdown(summary))


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
