rule finetune_model:
    input:
        base="results/models/{model}/base/info.json",
        train="results/data/{dataset}/train.jsonl.gz",
        validation="results/data/{dataset}/validation.jsonl.gz",
    output:
        weights="results/models/{model}/{dataset}/model.safetensors",
        curve="results/models/{model}/{dataset}/loss_curve.json",
    log:
        "logs/finetune_model/{model}/{dataset}.log",
    benchmark:
        "benchmarks/finetune_model/{model}/{dataset}.tsv"
    # Before any measurement: these share the cores, and measured jobs need all of them.
    priority: 70
    conda:
        "../../envs/finetune.yaml"
    threads: finetune_threads
    resources:
        gpu=finetune_gpus,
        mem_mb=finetune_memory,
        runtime=1440,
    params:
        finetune=finetune_block,
        code=code("finetune_model"),
    message:
        "Fine-tuning {wildcards.model} on {wildcards.dataset} for every exit"
    script:
        "../scripts/finetune_model.py"
