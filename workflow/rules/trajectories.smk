rule record_trajectories:
    input:
        weights="results/models/{model}/{dataset}/model.safetensors",
        train="results/data/{dataset}/train.jsonl.gz",
        validation="results/data/{dataset}/validation.jsonl.gz",
    output:
        train="results/trajectories/{model}/{dataset}/train.safetensors",
        validation="results/trajectories/{model}/{dataset}/validation.safetensors",
    log:
        "logs/record_trajectories/{model}/{dataset}.log",
    benchmark:
        "benchmarks/record_trajectories/{model}/{dataset}.tsv"
    # Before any measurement: these share the cores, and measured jobs need all of them.
    priority: 60
    conda:
        "../../envs/trajectories.yaml"
    threads: STUDY["threads"]
    resources:
        gpu=gpus,
        mem_mb=memory,
        runtime=240,
    params:
        trajectories=trajectories_block,
        code=code("record_trajectories"),
    message:
        "Recording what every exit of {wildcards.model} answers on {wildcards.dataset}"
    script:
        "../scripts/record_trajectories.py"


rule record_along:
    input:
        weights="results/models/{model}/{dataset}/model.safetensors",
        train="results/data/{dataset}/train.jsonl.gz",
        policy=writer_of,
    output:
        train="results/trajectories/{model}/{dataset}/{agent}/train.safetensors",
    log:
        "logs/record_along/{model}/{dataset}/{agent}.log",
    benchmark:
        "benchmarks/record_along/{model}/{dataset}/{agent}.tsv"
    priority: 60
    conda:
        "../../envs/trajectories.yaml"
    threads: STUDY["threads"]
    resources:
        gpu=gpus,
        mem_mb=memory,
        runtime=240,
    params:
        trajectories=trajectories_block,
        along=along_block,
        code=code("record_along"),
    message:
        "Recording {wildcards.model} on {wildcards.dataset} along early-exit text for agent {wildcards.agent}"
    script:
        "../scripts/record_along.py"
