rule calibrate:
    input:
        unpack(network_of),
        train="results/trajectories/{model}/{dataset}/train.safetensors",
        validation="results/trajectories/{model}/{dataset}/validation.safetensors",
    output:
        "results/calibration/{model}/{dataset}/{exit_rule}.json",
    log:
        "logs/calibrate/{model}/{dataset}/{exit_rule}.log",
    benchmark:
        "benchmarks/calibrate/{model}/{dataset}/{exit_rule}.tsv"
    priority: 40
    conda:
        "../../envs/agent.yaml"
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        calibration=calibration_block,
        code=code("calibrate_rule"),
    message:
        "Finding what {wildcards.exit_rule} of {wildcards.model} can promise on {wildcards.dataset}"
    script:
        "../scripts/calibrate_rule.py"
