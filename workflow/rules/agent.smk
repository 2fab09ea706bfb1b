rule train_agent:
    input:
        train=training_episodes,
        validation="results/trajectories/{model}/{dataset}/validation.safetensors",
    output:
        policy="results/agents/{model}/{dataset}/{agent}{run}/policy.safetensors",
        curve="results/agents/{model}/{dataset}/{agent}{run}/learning.json",
    log:
        "logs/train_agent/{model}/{dataset}/{agent}{run}.log",
    benchmark:
        "benchmarks/train_agent/{model}/{dataset}/{agent}{run}.tsv"
    # Empty for the agent in use; another seed is in a folder of its own and only shows the spread.
    wildcard_constraints:
        run=r"(/seed-\d+)?",
    # Before any measurement: these share the cores, and measured jobs need all of them.
    priority: 50
    conda:
        "../../envs/agent.yaml"
    threads: STUDY["threads"]
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        agent=agent_block,
        code=code("train_agent"),
    message:
        "Training agent {wildcards.agent}{wildcards.run} for {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/train_agent.py"


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
        code=code("calibrate"),
    message:
        "Finding what {wildcards.exit_rule} of {wildcards.model} can promise on {wildcards.dataset}"
    script:
        "../scripts/calibrate.py"
