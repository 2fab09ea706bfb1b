"""The study's provenance and what it cost."""

from greencode import job, manifest
from greencode.files import write_json
from greencode.tables import write_table


def main(smk):
    study, outputs = smk.params.study, smk.input.outputs
    costs = manifest.costs_of(outputs, study["generate"]["cpu_watts"] or None, study["carbon_intensity"])
    write_table(manifest.cost_table(costs), smk.output.cost)
    files = [*outputs, smk.output.cost]
    write_json(
        smk.output.manifest, manifest.build(study, files, smk.input.sources, smk.params.configs, costs)
    )


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
