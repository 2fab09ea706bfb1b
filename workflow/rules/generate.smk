# Measured work runs alone: these rules hold the one meter and every core. On a cluster all of a pair are one
# job on one node, so that what is compared was measured on the same machine.


rule generate_base:
    input:
        weights="results/models/{model}/base/info.json",
        test="results/data/{dataset}/test.jsonl.gz",
    output:
        "results/generations/{model}/{dataset}/base.jsonl",
    log:
        "logs/generate_base/{model}/{dataset}.log",
    benchmark:
        "benchmarks/generate_base/{model}/{dataset}.tsv"
    group:
        "measure_{model}_{dataset}"
    conda:
        "../../envs/generate.yaml"
    threads: measured_threads
    resources:
        meter=1,
        gpu=gpus,
        mem_mb=memory,
        runtime=60,
    params:
        generate=generate_block,
        code=code("generate_method"),
    message:
        "Completing the test split of {wildcards.dataset} with base {wildcards.model}"
    script:
        "../scripts/generate_method.py"


rule generate_full:
    input:
        weights="results/models/{model}/{dataset}/model.safetensors",
        test="results/data/{dataset}/test.jsonl.gz",
    output:
        "results/generations/{model}/{dataset}/full.jsonl",
    log:
        "logs/generate_full/{model}/{dataset}.log",
    benchmark:
        "benchmarks/generate_full/{model}/{dataset}.tsv"
    group:
        "measure_{model}_{dataset}"
    conda:
        "../../envs/generate.yaml"
    threads: measured_threads
    resources:
        meter=1,
        gpu=gpus,
        mem_mb=memory,
        runtime=60,
    params:
        generate=generate_block,
        code=code("generate_method"),
    message:
        "Completing the test split of {wildcards.dataset} with {wildcards.model} at full depth"
    script:
        "../scripts/generate_method.py"


rule generate_fixed:
    input:
        weights="results/models/{model}/{dataset}/model.safetensors",
        test="results/data/{dataset}/test.jsonl.gz",
    output:
        "results/generations/{model}/{dataset}/fixed-{depth}.jsonl",
    log:
        "logs/generate_fixed/{model}/{dataset}/{depth}.log",
    benchmark:
        "benchmarks/generate_fixed/{model}/{dataset}/{depth}.tsv"
    group:
        "measure_{model}_{dataset}"
    conda:
        "../../envs/generate.yaml"
    threads: measured_threads
    resources:
        meter=1,
        gpu=gpus,
        mem_mb=memory,
        runtime=60,
    params:
        depth="{depth}",
        generate=generate_block,
        code=code("generate_method"),
    message:
        "Completing the test split of {wildcards.dataset} with {wildcards.model} at exit {wildcards.depth}"
    script:
        "../scripts/generate_method.py"


rule generate_agent:
    input:
        weights="results/models/{model}/{dataset}/model.safetensors",
        policy="results/agents/{model}/{dataset}/{agent}/policy.safetensors",
        test="results/data/{dataset}/test.jsonl.gz",
    output:
        "results/generations/{model}/{dataset}/{agent}-T{threshold}.jsonl",
    log:
        "logs/generate_agent/{model}/{dataset}/{agent}-T{threshold}.log",
    benchmark:
        "benchmarks/generate_agent/{model}/{dataset}/{agent}-T{threshold}.tsv"
    group:
        "measure_{model}_{dataset}"
    conda:
        "../../envs/generate.yaml"
    threads: measured_threads
    resources:
        meter=1,
        gpu=gpus,
        mem_mb=memory,
        runtime=60,
    params:
        threshold="{threshold}",
        generate=generate_block,
        code=code("generate_method"),
    message:
        "Completing the test split of {wildcards.dataset} with {wildcards.model}, {wildcards.agent} at T = {wildcards.threshold}"
    script:
        "../scripts/generate_method.py"


rule generate_promise:
    input:
        weights="results/models/{model}/{dataset}/model.safetensors",
        policy="results/agents/{model}/{dataset}/{agent}/policy.safetensors",
        test="results/data/{dataset}/test.jsonl.gz",
        calibration="results/calibration/{model}/{dataset}/{agent}.json",
    output:
        "results/generations/{model}/{dataset}/{agent}-{wanted}{target}.jsonl",
    log:
        "logs/generate_promise/{model}/{dataset}/{agent}-{wanted}{target}.log",
    benchmark:
        "benchmarks/generate_promise/{model}/{dataset}/{agent}-{wanted}{target}.tsv"
    group:
        "measure_{model}_{dataset}"
    conda:
        "../../envs/generate.yaml"
    threads: measured_threads
    resources:
        meter=1,
        gpu=gpus,
        mem_mb=memory,
        runtime=60,
    params:
        wanted="{wanted}",
        target="{target}",
        generate=generate_block,
        code=code("generate_method"),
    message:
        "Completing the test split of {wildcards.dataset} with {wildcards.model}, {wildcards.agent} at the threshold that promises {wildcards.wanted} {wildcards.target}"
    script:
        "../scripts/generate_method.py"


rule measure_overhead:
    input:
        weights="results/models/{model}/{dataset}/model.safetensors",
        policy="results/agents/{model}/{dataset}/{agent}/policy.safetensors",
        test="results/data/{dataset}/test.jsonl.gz",
    output:
        "results/overhead/{model}/{dataset}/{agent}.json",
    log:
        "logs/measure_overhead/{model}/{dataset}/{agent}.log",
    benchmark:
        "benchmarks/measure_overhead/{model}/{dataset}/{agent}.tsv"
    group:
        "measure_{model}_{dataset}"
    conda:
        "../../envs/generate.yaml"
    threads: measured_threads
    resources:
        meter=1,
        gpu=gpus,
        mem_mb=memory,
        runtime=60,
    params:
        generate=overhead_block,
        code=code("measure_overhead"),
    message:
        "Measuring what agent {wildcards.agent} costs {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/measure_overhead.py"
