from snakemake.utils import min_version

min_version("9.19")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/finetune.smk"
include: "workflow/rules/trajectories.smk"
include: "workflow/rules/agent.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/generate.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/frontier.smk"
include: "workflow/rules/pretrain.smk"
include: "workflow/rules/provenance.smk"


localrules:
    figures,
    tables,
    frontier,
    pretrain,


rule figures:
    default_target: True
    input:
        FIGURES,
        TABLES,
        rules.write_manifest.output,


rule tables:
    input:
        TABLES,


rule frontier:
    input:
        FRONTIER,
        rules.write_frontier_manifest.output,


rule pretrain:
    input:
        pretrained,
