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
