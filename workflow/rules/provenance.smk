import os

# Base models that the study makes itself.
MADE = [
    Path(model["path"]).name
    for model in STUDY["models"].values()
    if model.get("path") in study.pretrained(STUDY)
]
# Every file of the study, stage by stage: first those of which figures and the frontier are made.
SHARED = [
    *(
        [
            *rules.train_tokenizer.output,
            *rules.pack_corpus.output,
            *rules.validate_ngrams.output,
            *expand(rules.pretrain_model.output, shape=MADE),
            *expand(rules.validate_model.output, shape=MADE),
        ]
        if MADE
        else []
    ),
    *expand(rules.prepare_corpus.output, dataset=DATASETS),
    *expand(rules.fetch_base_model.output, model=MODELS),
    *expand(rules.finetune_model.output, model=MODELS, dataset=DATASETS),
    *expand(rules.record_trajectories.output, model=MODELS, dataset=DATASETS),
    *expand(rules.record_along.output, model=MODELS, dataset=DATASETS, agent=ALONG),
    *expand(
        rules.train_agent.output, model=MODELS, dataset=DATASETS, agent=AGENTS, run=""
    ),
    *expand(
        [f"{folder}/policy.safetensors" for folder in OTHER_SEEDS],
        model=MODELS,
        dataset=DATASETS,
    ),
    *SEED_LEARNING,
]
OUTPUTS = [
    *SHARED,
    *expand(
        rules.measure_overhead.output, model=MODELS, dataset=DATASETS, agent=AGENTS
    ),
    *expand(
        rules.calibrate.output,
        model=MODELS,
        dataset=DATASETS,
        exit_rule=AGENTS if TARGETS else [],
    ),
    *[
        f"results/generations/{model}/{dataset}/{method}.jsonl"
        for model, dataset in PAIRS
        for method in methods_of(model)
    ],
    *evaluations_of(MODELS, DATASETS),
    *FIGURES,
    *TABLES,
    "results/tables/summary.md",
]
FRONTIER_OUTPUTS = [
    *SHARED,
    *expand(rules.train_policy.output, model=MODELS, dataset=DATASETS, policy=TRAINED),
    *expand(rules.calibrate.output, model=MODELS, dataset=DATASETS, exit_rule=RULES),
    *expand(rules.choose_thresholds.output, model=MODELS, dataset=DATASETS),
    *expand(rules.generate_frontier.output, model=MODELS, dataset=DATASETS),
    *expand(rules.evaluate_frontier.output, model=MODELS, dataset=DATASETS),
    *FRONTIER,
]
SOURCES = [
    *(
        path
        for dataset in STUDY["datasets"].values()
        for path in files_at(dataset["source"].get("path"))
    ),
    *(
        path
        for model in STUDY["models"].values()
        if model.get("path") not in study.pretrained(STUDY)
        for path in files_at(model.get("path"))
    ),
    PUBLISHED,
]


rule write_manifest:
    input:
        outputs=OUTPUTS,
        sources=SOURCES,
    output:
        manifest="results/manifest.json",
        cost=report(
            "results/tables/cost.csv",
            caption="../report/tables.rst",
            category="6 Tables",
            labels={"table": "", "shows": "What the study itself cost"},
        ),
    log:
        "logs/write_manifest.log",
    conda:
        "../../envs/provenance.yaml"
    # Every byte of the study is read; not in the group of the figures, of which it is made.
    resources:
        runtime=120,
    params:
        study=STUDY,
        configs=[os.path.relpath(path) for path in workflow.configfiles],
        code=code("write_manifest"),
    message:
        "Writing how the study's files were made, and what they cost"
    script:
        "../scripts/write_manifest.py"


# The frontier has a manifest of its own: in that of the figures its files would be stale as often as figures
# are made without it.
use rule write_manifest as write_frontier_manifest with:
    input:
        outputs=FRONTIER_OUTPUTS,
        sources=SOURCES,
    output:
        manifest="results/frontier_manifest.json",
        cost=report(
            "results/tables/frontier_cost.csv",
            caption="../report/tables.rst",
            category="7 Frontier",
            labels={"table": "cost", "shows": "What the frontier cost"},
        ),
    log:
        "logs/write_frontier_manifest.log",
    message:
        "Writing how the frontier's files were made, and what they cost"
