rule evaluate_method:
    input:
        "results/generations/{model}/{dataset}/{method}.jsonl",
    output:
        "results/evaluation/{model}/{dataset}/{method}.json",
    log:
        "logs/evaluate_method/{model}/{dataset}/{method}.log",
    benchmark:
        "benchmarks/evaluate_method/{model}/{dataset}/{method}.tsv"
    group:
        "score_{model}_{dataset}"
    conda:
        "../../envs/evaluate.yaml"
    resources:
        mem_mb=1000,
        runtime=20,
    params:
        evaluate={"seed": STUDY["seed"], **STUDY["evaluate"]},
        code=code("evaluate_method"),
    message:
        "Scoring {wildcards.method} of {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/evaluate_method.py"
