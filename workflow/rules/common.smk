import contextlib
import fcntl
import functools
import shutil
import sys
import warnings
from pathlib import Path

from greencode import config as study
from greencode.corpus import needs_fetching
from greencode.errors import UserError
from greencode.exits import lite_weights

REPOSITORY = Path(workflow.basedir)
# Snakemake leaves it empty, and Python drops every warning that is raised from code without a name.
__name__ = "workflow"


def checked(config):
    """The completed configuration; a fault in it is one sentence, and no job starts."""
    try:
        completed = study.complete(dict(config))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            study.check(completed)
        # Every job reads this file again; the user wants to be warned once.
        if workflow.is_main_process:
            for warning in dict.fromkeys(str(warning.message) for warning in caught):
                print(f"Warning: {warning}", file=sys.stderr)
        return completed
    except UserError as error:
        # An exception would bring a trace of the rules, and go to stdout in a dry-run.
        sys.exit(str(error))


def alive():
    """A lock that ends with its processes, so that a killed run's leftover lock can be told and removed.

    All processes of a run share it; whoever gets it alone knows that no other run is at work here.
    """
    try:
        Path(".snakemake").mkdir(exist_ok=True)
        handle = open(".snakemake/alive", "a")
    except OSError as error:
        sys.exit(
            f"The study's folder cannot be written: {error.strerror}: {error.filename}."
        )
    with contextlib.suppress(OSError):
        # Only a run looks for leftovers: a job on another node may be unable to see the run's own hold.
        if workflow.is_main_process:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for leftover in Path(".snakemake/locks").glob("*.lock"):
                    leftover.unlink()
        fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


STUDY = checked(config)
ALIVE = alive()
PUBLISHED = str(REPOSITORY / "resources" / "published_values.csv")
MODELS = list(STUDY["models"])
DATASETS = list(STUDY["datasets"])
AGENTS = list(STUDY["agents"])
ALONG = [name for name, agent in STUDY["agents"].items() if "along" in agent]
THRESHOLDS = [f"{threshold:.15g}" for threshold in STUDY["thresholds"]]
TARGETS = [
    f"{wanted}{target:.15g}"
    for wanted, targets in STUDY["targets"].items()
    for target in targets
]
EXITS = {name: study.points_of(model) for name, model in STUDY["models"].items()}


def any_of(names):
    return "|".join(map(re.escape, names)) or "none"


wildcard_constraints:
    model=any_of(MODELS),
    dataset=any_of(DATASETS),
    agent=any_of(AGENTS),
    policy=any_of(STUDY["frontier"]["rules"]),
    exit_rule=any_of([*AGENTS, *STUDY["frontier"]["rules"]]),
    wanted=any_of(STUDY["targets"]),
    target=r"[0-9.e-]+",
    depth=r"\d+",
    threshold=r"[0-9.e-]+",
    method=r"[A-Za-z][A-Za-z0-9]*(-[A-Za-z]*[0-9.e-]+)?",


@functools.cache
def code_hash(script):
    return study.code_of(REPOSITORY / "workflow" / "scripts" / f"{script}.py")


def code(script):
    """What a rule's script does, as a param: see greencode.config.code_of.

    A function, so that a job, which reads all rules again, hashes its own script only.
    """

    def hashed(wildcards):
        return code_hash(script)

    return hashed


def files_at(path):
    """A local file, or the files directly in a local folder; none for anything else."""
    if path is None:
        return []
    path = Path(path)
    return [path] if path.is_file() else sorted(filter(Path.is_file, path.glob("*")))


# Input from outside the workflow: a dataset or model that is replaced re-runs what was made of it.
def dataset_files(wildcards):
    dataset = STUDY["datasets"][wildcards.dataset]
    source = dataset["source"]
    if source["kind"] != "hub":
        return files_at(source["path"])
    config = source.get("config") or dataset["language"]
    return files_at(source["name"]) + files_at(Path(source["name"]) / config)


def fetched_source(wildcards):
    """The record of a source's download; none for a source that is here already."""
    source = STUDY["datasets"][wildcards.dataset]["source"]
    return "results/data/{dataset}/source.json" if needs_fetching(source) else []


def model_files(wildcards):
    path = STUDY["models"][wildcards.model].get("path")
    if path in study.pretrained(STUDY):
        return expand(
            "{path}/{name}", path=path, name=["model.safetensors", "README.md"]
        )
    return files_at(path)


# One dict per stage: Snakemake compares the values of params without their names.
def dataset_block(wildcards):
    dataset = STUDY["datasets"][wildcards.dataset]
    return {"seed": STUDY["seed"], **STUDY["data"], **dataset}


def source_block(wildcards):
    dataset = STUDY["datasets"][wildcards.dataset]
    return {"language": dataset["language"], **dataset["source"]}


def model_block(wildcards):
    model = STUDY["models"][wildcards.model]
    return model | {"exit_points": list(EXITS[wildcards.model])}


def finetune_block(wildcards):
    return {
        "seed": STUDY["seed"],
        "device": STUDY["device"],
        "exit_points": list(EXITS[wildcards.model]),
        **study.finetune_of(STUDY, wildcards.dataset),
    }


def trajectories_block(wildcards):
    return {
        "seed": STUDY["seed"],
        "device": STUDY["device"],
        "exit_points": list(EXITS[wildcards.model]),
        **STUDY["trajectories"],
    }


def agent_block(wildcards):
    agent = study.agent_of(STUDY, wildcards.agent, wildcards.model, wildcards.dataset)
    first = study.seeds_of(STUDY, wildcards.agent)[0]
    return {"seed": int(wildcards.run.rpartition("-")[2] or first), **agent}


def along_block(wildcards):
    return STUDY["agents"][wildcards.agent]["along"]


def writer_of(wildcards):
    """The agent along whose text another one's training episodes are recorded."""
    name = along_block(wildcards)["agent"]
    return f"results/agents/{{model}}/{{dataset}}/{name}/policy.safetensors"


def training_episodes(wildcards):
    """What an agent learns from: the pair's episodes, or its own along early-exit text."""
    own = "{agent}/" if wildcards.agent in ALONG else ""
    return f"results/trajectories/{{model}}/{{dataset}}/{own}train.safetensors"


def generate_block(wildcards):
    return {
        "seed": STUDY["seed"],
        "device": STUDY["device"],
        "exit_points": list(EXITS[wildcards.model]),
        "language": STUDY["datasets"][wildcards.dataset]["language"],
        **STUDY["generate"],
    }


def policy_block(wildcards):
    return {"seed": STUDY["seed"], **STUDY["frontier"]["rules"][wildcards.policy]}


def frontier_block(wildcards):
    return generate_block(wildcards) | STUDY["frontier"]


def overhead_block(wildcards):
    return generate_block(wildcards) | {"overhead": STUDY["overhead"]}


def measured_threads(wildcards):
    """CPUs of a measured job: all that a run on this machine was given, so that nothing runs beside it; on a
    cluster, where the profile keeps others away, as many as it uses.
    """
    given = None if workflow.remote_exec else workflow.resource_settings.cores
    return given or STUDY["generate"]["threads"]


def memory(wildcards):
    """MB for a process with the model loaded: the libraries, the weights as float32 and while being read."""
    weights = Path(f"results/models/{wildcards.model}/base").glob("*.safetensors")
    return 4000 + 3 * sum(path.stat().st_size for path in weights) // 10**6


def gpus(wildcards):
    """One GPU where the study runs on one: `auto` asks this machine, from which jobs are submitted."""
    if STUDY["device"] == "auto":
        return int(shutil.which("nvidia-smi") is not None)
    return int(STUDY["device"].startswith("cuda"))


# A launched fine-tuning has as many of everything as it has processes.
def finetune_threads(wildcards):
    return STUDY["threads"] * finetune_block(wildcards)["processes"]


def finetune_gpus(wildcards):
    return gpus(wildcards) * finetune_block(wildcards)["processes"]


def finetune_memory(wildcards):
    return 4000 * finetune_block(wildcards)["processes"]


def fixed_of(model):
    """Methods of one depth for every token, the full one first."""
    return ["full", *(f"fixed-{depth}" for depth in EXITS[model][:-1])]


def methods_of(model):
    """Every method that is generated for a model, baselines first."""
    ends = [*(f"T{threshold}" for threshold in THRESHOLDS), *TARGETS]
    return [
        "base",
        *fixed_of(model),
        *(f"{agent}-{end}" for agent in AGENTS for end in ends),
    ]


# Trained rules have files: agents those of PPO, other rules those of train_policy.
TRAINED = [
    name
    for name, rule in STUDY["frontier"]["rules"].items()
    if rule["kind"] in ("classifier", "stopping")
]
RULES = {
    name: rule["kind"] for name, rule in STUDY["frontier"]["rules"].items()
} | dict.fromkeys(AGENTS, "agent")
RULES_BLOCK = {"seed": STUDY["seed"], "temperature": STUDY["generate"]["temperature"]}
# Drafts are verified with what the cache holds.
VERIFIED = {} if STUDY["generate"]["kv"] == "none" else STUDY["frontier"]["verified"]
POLICIES = [
    *(
        f"results/agents/{{model}}/{{dataset}}/{name}/policy.safetensors"
        for name in AGENTS
    ),
    *(
        f"results/policies/{{model}}/{{dataset}}/{name}/policy.safetensors"
        for name in TRAINED
    ),
]
# Other seeds of the agents: they show how far trainings come apart, and no text is completed with them.
OTHER_SEEDS = [
    f"results/agents/{{model}}/{{dataset}}/{name}/seed-{seed}"
    for name in AGENTS
    for seed in study.seeds_of(STUDY, name)[1:]
]
CALIBRATIONS = [
    f"results/calibration/{{model}}/{{dataset}}/{name}.json" for name in RULES
]


def calibration_block(wildcards):
    """All that a rule's promises depend on; what the methods need is promised too. ROUGE-L is of agents only."""
    block, rule = STUDY["calibration"], wildcards.exit_rule
    wanted = {
        name: sorted({*block[name], *targets})
        for name, targets in STUDY["targets"].items()
    }
    wanted["rougeL"] = wanted["rougeL"] if rule in AGENTS else []
    about = {"kind": RULES[rule], "device": STUDY["device"]}
    return {**RULES_BLOCK, **block, **wanted, **about}


def calibration_files(wildcards):
    """A trained rule's network, and what it takes to write text where ROUGE-L is to be promised."""
    name, pair = wildcards.exit_rule, f"{wildcards.model}/{wildcards.dataset}"
    files = {}
    if name in AGENTS or name in TRAINED:
        folder = "agents" if name in AGENTS else "policies"
        files["policy"] = f"results/{folder}/{pair}/{name}/policy.safetensors"
    if calibration_block(wildcards)["rougeL"]:
        files["weights"] = f"results/models/{pair}/model.safetensors"
        files["texts"] = f"results/data/{wildcards.dataset}/validation.jsonl.gz"
    return files


def calibration_gpus(wildcards):
    """Only text needs the model."""
    return gpus(wildcards) if calibration_block(wildcards)["rougeL"] else 0


def evaluations_of(models, datasets, methods=methods_of):
    return [
        f"results/evaluation/{model}/{dataset}/{method}.json"
        for model in models
        for dataset in datasets
        for method in methods(model)
    ]


def pair_evaluations(wildcards):
    return evaluations_of([wildcards.model], [wildcards.dataset])


# Figures 8-11 of the paper are one per pair; a study with more pairs goes on counting.
PAIRS = [(model, dataset) for dataset in DATASETS for model in MODELS]
PAIR_FIGURES = {
    f"fig{number:02d}_{model}_{dataset}": (model, dataset)
    for number, (model, dataset) in enumerate(PAIRS, start=8)
}
STEMS = [
    "fig01_fixed_exit",
    "fig03_exit_weights",
    "fig04_loss_curves",
    "fig06_agent_reward",
    "fig07_optimal_exits",
    *PAIR_FIGURES,
    "published_vs_measured",
]
FORMATS = ["pdf", "png", "csv"]
FIGURES = expand("results/figures/{stem}.{format}", stem=STEMS, format=FORMATS)
TABLES = expand(
    "results/tables/{name}.csv",
    name=[
        "table1_datasets",
        "table2_models",
        "table3_ppo",
        "table4_overhead",
        "summary",
        "all_results",
    ],
)
FRONTIER = expand(
    "results/figures/{stem}.{format}",
    stem=["fig12_calibration", *(f"frontier_{m}_{d}" for m, d in PAIRS)],
    format=FORMATS,
) + expand(
    "results/tables/{name}",
    name=[
        "frontier_points.csv",
        "frontier_savings.csv",
        "frontier_tests.csv",
        "frontier_seeds.csv",
        "calibration.csv",
        "frontier.md",
    ],
)
LEARNING = [
    f"results/agents/{m}/{d}/{agent}/learning.json"
    for m, d in PAIRS
    for agent in AGENTS
]
SEED_LEARNING = expand(
    [f"{folder}/learning.json" for folder in OTHER_SEEDS],
    model=MODELS,
    dataset=DATASETS,
)
WEIGHTED = [
    {
        "name": name,
        "layers": model["layers"],
        "exit_points": list(EXITS[name]),
        "weights": list(
            lite_weights(
                EXITS[name],
                tuple(STUDY["finetune"]["budgets"]),
                STUDY["finetune"]["decay"],
            )
        ),
    }
    for name, model in STUDY["models"].items()
]
PRETRAIN = STUDY.get("pretrain", {})


def pretrained(wildcards):
    """The base models to be made; without the configuration that names them there is nothing to do."""
    if not PRETRAIN.get("models"):
        sys.exit(
            "pretrain: no base models to make; add --configfile config/pretrain.yaml, or a file like it."
        )
    return expand("results/pretrain/{shape}/README.md", shape=PRETRAIN["models"])
