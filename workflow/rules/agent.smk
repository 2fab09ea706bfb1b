rule train_agent:
    input:
        train="results/trajectories/{model}/{dataset}/train.safetensors",
        validation="results/trajectories/{model}/{dataset}/validation.safetensors",
    output:
        policy="results/agents/{model}/{dataset}/{agent}/policy.safetensors",
        curve="results/agents/{model}/{dataset}/{agent}/learning.json",
    log:
        "logs/train_agent/{model}/{dataset}/{agent}.log",
    benchmark:
        "benchmarks/train_agent/{model}/{dataset}/{agent}.tsv"
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
        "Training agent {wildcards.agent} for {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/train_agent.py"
