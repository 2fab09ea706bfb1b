# One rule per figure of the paper; each writes PDF, PNG and the plotted numbers as CSV.


rule figure_fixed_exit:
    input:
        evaluations=evaluations_of(MODELS, DATASETS, methods=fixed_of),
    output:
        pdf="results/figures/fig01_fixed_exit.pdf",
        png=report(
            "results/figures/fig01_fixed_exit.png",
            caption="../report/fig01.rst",
            category="1 Motivation",
            labels={
                "figure": "1",
                "shows": "Quality, energy and latency of fixed exits",
            },
        ),
        csv="results/figures/fig01_fixed_exit.csv",
    log:
        "logs/figure_fixed_exit/draw.log",
    group:
        "report"
    conda:
        "../../envs/report.yaml"
    params:
        function="fig01_fixed_exit",
        data="evaluations",
        style=STUDY["figures"],
        code=code("draw_figure"),
    message:
        "Drawing Figure 1"
    script:
        "../scripts/draw_figure.py"


rule figure_exit_weights:
    output:
        pdf="results/figures/fig03_exit_weights.pdf",
        png=report(
            "results/figures/fig03_exit_weights.png",
            caption="../report/fig03.rst",
            category="2 Fine-tuning",
            labels={"figure": "3", "shows": "Weight of each exit's loss"},
        ),
        csv="results/figures/fig03_exit_weights.csv",
    log:
        "logs/figure_exit_weights/draw.log",
    group:
        "report"
    conda:
        "../../envs/report.yaml"
    params:
        function="fig03_exit_weights",
        data="models",
        models=WEIGHTED,
        style=STUDY["figures"],
        code=code("draw_figure"),
    message:
        "Drawing Figure 3"
    script:
        "../scripts/draw_figure.py"


rule figure_loss_curves:
    input:
        curves=[f"results/models/{m}/{d}/loss_curve.json" for m, d in PAIRS],
    output:
        pdf="results/figures/fig04_loss_curves.pdf",
        png=report(
            "results/figures/fig04_loss_curves.png",
            caption="../report/fig04.rst",
            category="2 Fine-tuning",
            labels={"figure": "4", "shows": "Loss of each exit in fine-tuning"},
        ),
        csv="results/figures/fig04_loss_curves.csv",
    log:
        "logs/figure_loss_curves/draw.log",
    group:
        "report"
    conda:
        "../../envs/report.yaml"
    params:
        function="fig04_loss_curves",
        data="curves",
        pairs=[list(pair) for pair in PAIRS],
        style=STUDY["figures"],
        code=code("draw_figure"),
    message:
        "Drawing Figure 4"
    script:
        "../scripts/draw_figure.py"


rule figure_agent_reward:
    input:
        learning=LEARNING + SEED_LEARNING,
    output:
        pdf="results/figures/fig06_agent_reward.pdf",
        png=report(
            "results/figures/fig06_agent_reward.png",
            caption="../report/fig06.rst",
            category="3 Agent",
            labels={"figure": "6", "shows": "Convergence of PPO"},
        ),
        csv="results/figures/fig06_agent_reward.csv",
    log:
        "logs/figure_agent_reward/draw.log",
    group:
        "report"
    conda:
        "../../envs/report.yaml"
    params:
        function="fig06_agent_reward",
        data="learning",
        style=STUDY["figures"],
        code=code("draw_figure"),
    message:
        "Drawing Figure 6"
    script:
        "../scripts/draw_figure.py"


rule figure_optimal_exits:
    input:
        learning=LEARNING,
    output:
        pdf="results/figures/fig07_optimal_exits.pdf",
        png=report(
            "results/figures/fig07_optimal_exits.png",
            caption="../report/fig07.rst",
            category="3 Agent",
            labels={"figure": "7", "shows": "Optimal exits in training"},
        ),
        csv="results/figures/fig07_optimal_exits.csv",
    log:
        "logs/figure_optimal_exits/draw.log",
    group:
        "report"
    conda:
        "../../envs/report.yaml"
    params:
        function="fig07_optimal_exits",
        data="learning",
        style=STUDY["figures"],
        code=code("draw_figure"),
    message:
        "Drawing Figure 7"
    script:
        "../scripts/draw_figure.py"


rule figure_pair:
    input:
        evaluations=pair_evaluations,
    output:
        pdf="results/figures/{number}_{model}_{dataset}.pdf",
        png=report(
            "results/figures/{number}_{model}_{dataset}.png",
            caption="../report/fig08_11.rst",
            category="4 Results",
            labels={"figure": "{number}", "shows": "{model} on {dataset}"},
        ),
        csv="results/figures/{number}_{model}_{dataset}.csv",
    log:
        "logs/figure_pair/{number}_{model}_{dataset}.log",
    wildcard_constraints:
        number=r"fig\d+",
    group:
        "report"
    conda:
        "../../envs/report.yaml"
    params:
        function="pair_figures",
        data="evaluations",
        style=STUDY["figures"],
        code=code("draw_figure"),
    message:
        "Drawing {wildcards.number}: {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/draw_figure.py"


rule figure_published_vs_measured:
    input:
        evaluations=evaluations_of(MODELS, DATASETS),
        published=PUBLISHED,
    output:
        pdf="results/figures/published_vs_measured.pdf",
        png=report(
            "results/figures/published_vs_measured.png",
            caption="../report/published_vs_measured.rst",
            category="5 Against the paper",
            labels={"figure": "", "shows": "The paper's curve beside this study's"},
        ),
        csv="results/figures/published_vs_measured.csv",
    log:
        "logs/figure_published_vs_measured/draw.log",
    group:
        "report"
    conda:
        "../../envs/report.yaml"
    params:
        function="published_vs_measured",
        data="published",
        style=STUDY["figures"],
        code=code("draw_figure"),
    message:
        "Drawing the paper's curve beside ours"
    script:
        "../scripts/draw_figure.py"


rule write_tables:
    input:
        evaluations=evaluations_of(MODELS, DATASETS),
        manifests=expand("results/data/{dataset}/manifest.json", dataset=DATASETS),
        models=expand("results/models/{model}/base/info.json", model=MODELS),
        learning=LEARNING,
        overheads=expand(
            "results/overhead/{model}/{dataset}/{agent}.json",
            model=MODELS,
            dataset=DATASETS,
            agent=AGENTS,
        ),
        published=PUBLISHED,
    output:
        table1_datasets=report(
            "results/tables/table1_datasets.csv",
            caption="../report/tables.rst",
            category="6 Tables",
            labels={"table": "1", "shows": "Datasets"},
        ),
        table2_models=report(
            "results/tables/table2_models.csv",
            caption="../report/tables.rst",
            category="6 Tables",
            labels={"table": "2", "shows": "Models"},
        ),
        table3_ppo=report(
            "results/tables/table3_ppo.csv",
            caption="../report/tables.rst",
            category="6 Tables",
            labels={"table": "3", "shows": "Hyperparameters of PPO"},
        ),
        table4_overhead=report(
            "results/tables/table4_overhead.csv",
            caption="../report/tables.rst",
            category="6 Tables",
            labels={"table": "4", "shows": "Overhead of the agent"},
        ),
        summary=report(
            "results/tables/summary.csv",
            caption="../report/tables.rst",
            category="6 Tables",
            labels={"table": "", "shows": "All methods at a glance"},
        ),
        all_results=report(
            "results/tables/all_results.csv",
            caption="../report/tables.rst",
            category="6 Tables",
            labels={"table": "", "shows": "Every metric of every method"},
        ),
        markdown="results/tables/summary.md",
    log:
        "logs/write_tables.log",
    group:
        "report"
    conda:
        "../../envs/report.yaml"
    params:
        datasets=DATASETS,
        models=MODELS,
        code=code("write_tables"),
    message:
        "Writing the tables"
    script:
        "../scripts/write_tables.py"
