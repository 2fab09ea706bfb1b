rule prepare_corpus:
    input:
        dataset_files,
    output:
        train="results/data/{dataset}/train.jsonl.gz",
        validation="results/data/{dataset}/validation.jsonl.gz",
        test="results/data/{dataset}/test.jsonl.gz",
        manifest="results/data/{dataset}/manifest.json",
    log:
        "logs/prepare_corpus/{dataset}.log",
    benchmark:
        "benchmarks/prepare_corpus/{dataset}.tsv"
    # A broken source is found before any long work starts.
    priority: 100
    localrule: True
    conda:
        "../../envs/data.yaml"
    params:
        dataset=dataset_block,
        code=code("prepare_corpus"),
    message:
        "Preparing {wildcards.dataset}: source code to CodeXGLUE tokens"
    script:
        "../scripts/prepare_corpus.py"
