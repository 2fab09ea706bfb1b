rule fetch_base_model:
    input:
        model_files,
    output:
        info="results/models/{model}/base/info.json",
    log:
        "logs/fetch_base_model/{model}.log",
    benchmark:
        "benchmarks/fetch_base_model/{model}.tsv"
    priority: 100
    retries: 2
    localrule: True
    conda:
        "../../envs/models.yaml"
    params:
        model=model_block,
        code=code("fetch_base_model"),
    message:
        "Fetching and checking base model {wildcards.model}"
    script:
        "../scripts/fetch_base_model.py"
