rule fetch_corpus:
    output:
        "results/data/{dataset}/source.json",
    log:
        "logs/fetch_corpus/{dataset}.log",
    benchmark:
        "benchmarks/fetch_corpus/{dataset}.tsv"
    # A broken source is found before any long work starts.
    priority: 100
    retries: 2
    localrule: True
    conda:
        "../../envs/data.yaml"
    params:
        source=source_block,
        code=code("fetch_corpus"),
    message:
        "Fetching and checking the source of {wildcards.dataset}"
    script:
        "../scripts/fetch_corpus.py"


rule prepare_corpus:
    input:
        files=dataset_files,
        fetched=fetched_source,
    output:
        train="results/data/{dataset}/train.jsonl.gz",
        validation="results/data/{dataset}/validation.jsonl.gz",
        test="results/data/{dataset}/test.jsonl.gz",
        manifest="results/data/{dataset}/manifest.json",
    log:
        "logs/prepare_corpus/{dataset}.log",
    benchmark:
        "benchmarks/prepare_corpus/{dataset}.tsv"
    priority: 100
    # Reads what is installed here, which other nodes may lack.
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
