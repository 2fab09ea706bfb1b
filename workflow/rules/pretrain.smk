rule train_tokenizer:
    output:
        "results/pretrain/tokenizer/tokenizer.json",
    log:
        "logs/train_tokenizer.log",
    conda:
        "../../envs/pretrain.yaml"
    params:
        pretrain={
            key: PRETRAIN.get(key)
            for key in [
                "corpus",
                "vocabulary",
                "tokenizer_files",
                "context",
                "held_back",
            ]
        },
        code=code("train_tokenizer"),
    message:
        "Training the tokenizer of the small base models"
    script:
        "../scripts/train_tokenizer.py"


rule pack_corpus:
    input:
        tokenizer="results/pretrain/tokenizer/tokenizer.json",
    output:
        "results/pretrain/train.npy",
    log:
        "logs/pack_corpus.log",
    conda:
        "../../envs/pretrain.yaml"
    params:
        pretrain={
            key: PRETRAIN.get(key)
            for key in ["corpus", "tokens", "context", "held_back"]
        },
        seed=STUDY["seed"],
        code=code("pack_corpus"),
    message:
        "Packing the training corpus"
    script:
        "../scripts/pack_corpus.py"


rule pretrain_model:
    input:
        tokenizer="results/pretrain/tokenizer/tokenizer.json",
        blocks="results/pretrain/train.npy",
    output:
        weights="results/pretrain/{shape}/model.safetensors",
        record="results/pretrain/{shape}/training.json",
    log:
        "logs/pretrain_model/{shape}.log",
    benchmark:
        "benchmarks/pretrain_model/{shape}.tsv"
    wildcard_constraints:
        shape=any_of(PRETRAIN.get("models", {})),
    conda:
        "../../envs/pretrain.yaml"
    threads: STUDY["threads"]
    resources:
        gpu=gpus,
        mem_mb=8000,
        runtime=1440,
    params:
        shape=lambda wildcards: PRETRAIN["models"][wildcards.shape],
        pretrain={
            key: value
            for key, value in PRETRAIN.items()
            if key not in ["models", "validation_files"]
        },
        watts=STUDY["generate"]["cpu_watts"],
        seed=STUDY["seed"],
        code=code("pretrain_model"),
    message:
        "Training base model {wildcards.shape} from scratch"
    script:
        "../scripts/pretrain_model.py"


VALIDATION = {
    key: PRETRAIN.get(key) for key in ["corpus", "context", "validation_files"]
}


rule validate_ngrams:
    input:
        tokenizer="results/pretrain/tokenizer/tokenizer.json",
        blocks="results/pretrain/train.npy",
    output:
        "results/pretrain/ngrams.json",
    log:
        "logs/validate_ngrams.log",
    conda:
        "../../envs/pretrain.yaml"
    resources:
        mem_mb=8000,
    params:
        pretrain=VALIDATION,
        seed=STUDY["seed"],
        code=code("validate_ngrams"),
    message:
        "Counting n-grams, for comparison"
    script:
        "../scripts/validate_ngrams.py"


rule validate_model:
    input:
        weights="results/pretrain/{shape}/model.safetensors",
        record="results/pretrain/{shape}/training.json",
        ngrams="results/pretrain/ngrams.json",
    output:
        quality="results/pretrain/{shape}/validation.json",
        card="results/pretrain/{shape}/README.md",
    log:
        "logs/validate_model/{shape}.log",
    wildcard_constraints:
        shape=any_of(PRETRAIN.get("models", {})),
    conda:
        "../../envs/pretrain.yaml"
    threads: STUDY["threads"]
    params:
        pretrain=VALIDATION,
        seed=STUDY["seed"],
        code=code("validate_model"),
    message:
        "Validating base model {wildcards.shape}"
    script:
        "../scripts/validate_model.py"
