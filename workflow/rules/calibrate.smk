rule calibrate:
    input:
        unpack(calibration_files),
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
        "../../envs/calibrate.yaml"
    threads: STUDY["threads"]
    resources:
        gpu=calibration_gpus,
        mem_mb=memory,
        runtime=60,
    params:
        calibration=calibration_block,
        code=code("calibrate"),
    message:
        "Finding what {wildcards.exit_rule} of {wildcards.model} can promise on {wildcards.dataset}"
    script:
        "../scripts/calibrate.py"
