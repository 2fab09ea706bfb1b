# Every exit rule side by side, on equal samples, in one measured run per model and dataset.


rule train_policy:
    input:
        train="results/trajectories/{model}/{dataset}/train.safetensors",
    output:
        "results/policies/{model}/{dataset}/{policy}/policy.safetensors",
    log:
        "logs/train_policy/{model}/{dataset}/{policy}.log",
    benchmark:
        "benchmarks/train_policy/{model}/{dataset}/{policy}.tsv"
    # Before any measurement: these share the cores, and measured jobs need all of them.
    priority: 50
    conda:
        "../../envs/frontier.yaml"
    threads: STUDY["threads"]
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        policy=policy_block,
        code=code("train_policy"),
    message:
        "Training exit rule {wildcards.policy} for {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/train_policy.py"


rule choose_thresholds:
    input:
        validation="results/trajectories/{model}/{dataset}/validation.safetensors",
        policies=POLICIES,
    output:
        "results/frontier/{model}/{dataset}/thresholds.json",
    log:
        "logs/choose_thresholds/{model}/{dataset}.log",
    benchmark:
        "benchmarks/choose_thresholds/{model}/{dataset}.tsv"
    priority: 40
    conda:
        "../../envs/frontier.yaml"
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        rules=RULES,
        frontier={
            **RULES_BLOCK,
            "shares": STUDY["frontier"]["shares"],
            "verified": VERIFIED,
        },
        code=code("choose_thresholds"),
    message:
        "Choosing thresholds of every rule for {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/choose_thresholds.py"


rule generate_frontier:
    input:
        weights="results/models/{model}/{dataset}/model.safetensors",
        policies=POLICIES,
        thresholds="results/frontier/{model}/{dataset}/thresholds.json",
        test="results/data/{dataset}/test.jsonl.gz",
    output:
        generations="results/frontier/{model}/{dataset}/generations.jsonl.gz",
        episodes="results/frontier/{model}/{dataset}/test.safetensors",
    log:
        "logs/generate_frontier/{model}/{dataset}.log",
    benchmark:
        "benchmarks/generate_frontier/{model}/{dataset}.tsv"
    group:
        "measure_{model}_{dataset}"
    conda:
        "../../envs/frontier.yaml"
    # Measured work runs alone: it holds the one meter and every core.
    threads: measured_threads
    resources:
        meter=1,
        gpu=gpus,
        mem_mb=memory,
        runtime=240,
    params:
        rules=RULES,
        generate=frontier_block,
        code=code("generate_frontier"),
    message:
        "Completing the test split of {wildcards.dataset} with {wildcards.model} under every exit rule"
    script:
        "../scripts/generate_frontier.py"


rule evaluate_frontier:
    input:
        generations="results/frontier/{model}/{dataset}/generations.jsonl.gz",
        episodes="results/frontier/{model}/{dataset}/test.safetensors",
        thresholds="results/frontier/{model}/{dataset}/thresholds.json",
        policies=POLICIES,
        calibrations=CALIBRATIONS,
        validation="results/trajectories/{model}/{dataset}/validation.safetensors",
        # Their thresholds are chosen here, so that one more seed does not measure everything anew.
        seeds=[f"{folder}/policy.safetensors" for folder in OTHER_SEEDS],
    output:
        "results/frontier/{model}/{dataset}/frontier.json",
    log:
        "logs/evaluate_frontier/{model}/{dataset}.log",
    benchmark:
        "benchmarks/evaluate_frontier/{model}/{dataset}.tsv"
    group:
        "score_{model}_{dataset}"
    conda:
        "../../envs/frontier.yaml"
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        rules=RULES,
        evaluate={**RULES_BLOCK, **STUDY["evaluate"]},
        code=code("evaluate_frontier"),
    message:
        "Scoring every exit rule of {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/evaluate_frontier.py"


rule figure_frontier:
    input:
        "results/frontier/{model}/{dataset}/frontier.json",
    output:
        pdf="results/figures/frontier_{model}_{dataset}.pdf",
        png=report(
            "results/figures/frontier_{model}_{dataset}.png",
            caption="../report/frontier.rst",
            category="7 Frontier",
            labels={"figure": "frontier", "shows": "{model} on {dataset}"},
        ),
        csv="results/figures/frontier_{model}_{dataset}.csv",
    log:
        "logs/figure_frontier/{model}_{dataset}.log",
    group:
        "report"
    conda:
        "../../envs/frontier.yaml"
    params:
        function="frontier",
        data="frontiers",
        style=STUDY["figures"],
        code=code("draw_figure"),
    message:
        "Drawing the frontier of {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/draw_figure.py"


rule figure_calibration:
    input:
        [f"results/frontier/{m}/{d}/frontier.json" for m, d in PAIRS],
    output:
        pdf="results/figures/fig12_calibration.pdf",
        png=report(
            "results/figures/fig12_calibration.png",
            caption="../report/fig12.rst",
            category="7 Frontier",
            labels={"figure": "12", "shows": "Promised against obtained"},
        ),
        csv="results/figures/fig12_calibration.csv",
    log:
        "logs/figure_calibration/draw.log",
    group:
        "report"
    conda:
        "../../envs/frontier.yaml"
    params:
        function="fig12_calibration",
        data="frontiers",
        style=STUDY["figures"],
        code=code("draw_figure"),
    message:
        "Drawing what was promised against what was obtained"
    script:
        "../scripts/draw_figure.py"


rule write_frontier:
    input:
        [f"results/frontier/{m}/{d}/frontier.json" for m, d in PAIRS],
    output:
        points=report(
            "results/tables/frontier_points.csv",
            caption="../report/frontier.rst",
            category="7 Frontier",
            labels={"table": "points", "shows": "Every rule at every depth"},
        ),
        summaries=report(
            "results/tables/frontier_savings.csv",
            caption="../report/frontier.rst",
            category="7 Frontier",
            labels={
                "table": "savings",
                "shows": "Saving at 99, 95 and 90 % of quality",
            },
        ),
        tests=report(
            "results/tables/frontier_tests.csv",
            caption="../report/frontier.rst",
            category="7 Frontier",
            labels={"table": "tests", "shows": "Rules against each other"},
        ),
        seeds=report(
            "results/tables/frontier_seeds.csv",
            caption="../report/frontier.rst",
            category="7 Frontier",
            labels={"table": "seeds", "shows": "Agents over their seeds"},
        ),
        calibration=report(
            "results/tables/calibration.csv",
            caption="../report/fig12.rst",
            category="7 Frontier",
            labels={"table": "calibration", "shows": "Promised against obtained"},
        ),
        words=report(
            "results/tables/frontier.md",
            caption="../report/frontier.rst",
            category="7 Frontier",
            labels={"table": "words", "shows": "What the data say"},
        ),
    log:
        "logs/write_frontier.log",
    group:
        "report"
    conda:
        "../../envs/frontier.yaml"
    params:
        code=code("write_frontier"),
    message:
        "Writing what the frontier says"
    script:
        "../scripts/write_frontier.py"
