"""The study's configuration: validated once, completed with defaults, canonical, before any job starts."""

from __future__ import annotations

import ast
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from greencode.errors import UserError
from greencode.exits import check_exit_points, exit_points

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.yaml"


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with every default filled in, numbers in one form, keys sorted.

    An explicit default and an implicit one give the same result, and so the same jobs. A key whose value
    is null counts as absent: a study that is merged over another takes out what it does not want so.

    Raises:
        UserError: naming the first faulty key and what is wrong with it.
    """
    config = _without_nulls(config)
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    faults = sorted(
        jsonschema.Draft202012Validator(schema).iter_errors(config), key=lambda e: list(map(str, e.path))
    )
    if faults:
        raise UserError(_sentence(faults[0]))
    return _fill(config, schema)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return value


def _sentence(fault: jsonschema.ValidationError) -> str:
    """One sentence for a schema violation."""
    where = ".".join(map(str, fault.path)) or "the top level"
    if fault.validator == "additionalProperties":
        known = ", ".join(sorted(fault.schema.get("properties", {})))
        unknown = sorted(set(fault.instance) - set(fault.schema.get("properties", {})), key=str)[0]
        return f"Configuration: unknown key {unknown!r} in {where}; known keys are {known}."
    if fault.validator == "required":
        return f"Configuration: {where}: {fault.message}."
    allowed = fault.schema.get("description")
    return f"Configuration: {where}: {fault.message}" + (f" ({allowed.rstrip('.')})" if allowed else "") + "."


def _fill(value: Any, schema: dict[str, Any]) -> Any:
    kind = schema.get("type")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        other = schema.get("additionalProperties")
        names = set(value) | {name for name, part in properties.items() if "default" in part}
        filled = {}
        for name in sorted(names):
            part = properties.get(name, other if isinstance(other, dict) else {})
            filled[name] = _fill(value.get(name, part.get("default")), part)
        return filled
    if isinstance(value, list):
        return [_fill(item, schema.get("items", {})) for item in value]
    if kind == "number" and not isinstance(value, bool):
        return float(value)
    if kind == "integer":
        return int(value)
    return value


def check(config: dict[str, Any], root: str | Path = ".") -> None:
    """Faults that a schema cannot see, found before any long work: exits, splits, files, models.

    Args:
        config: completed by `complete`.
        root: relative paths start here.

    Raises:
        UserError: one sentence on the first fault.
    """
    root = Path(root)
    if abs(sum(config["data"]["fractions"]) - 1) > 1e-6:
        raise UserError(f"Configuration: data.fractions {config['data']['fractions']} must sum to 1.")
    if config["trajectories"]["low"] > config["trajectories"]["high"]:
        raise UserError("Configuration: trajectories.low is above trajectories.high.")
    for name, dataset in config["datasets"].items():
        _check_source(name, dataset["source"], root)
    made = pretrained(config)
    for name, model in config["models"].items():
        points_of(model)
        if model.get("path") in made and "hub" not in model:
            _check_layers(name, model, made[model["path"]]["layers"])
        else:
            _check_model(name, model, root)
    if both := sorted(set(config["agents"]) & set(config["frontier"]["rules"])):
        raise UserError(f"Configuration: {both[0]} is an agent and a rule of the frontier; rename one.")
    for name in config["frontier"]["verified"]:
        if name not in config["agents"] and name not in config["frontier"]["rules"]:
            raise UserError(
                f"Configuration: frontier.verified names {name!r}, which is no agent and no rule of the "
                "frontier; set it to null there."
            )
    for name in config["agents"]:
        for dataset in config["agents"][name]["datasets"]:
            if dataset not in config["datasets"]:
                raise UserError(
                    f"Configuration: agents.{name}.datasets names {dataset!r}, which is not a dataset."
                )
        _check_along(config, name)
        _check_costs(config, name)
        for dataset in config["datasets"]:
            reward = reward_of(config, name, dataset)
            if reward["alpha"] > reward["beta"]:
                warnings.warn(
                    f"agents.{name}: alpha {reward['alpha']:g} is above beta {reward['beta']:g} on "
                    f"{dataset}; the paper has alpha <= beta.",
                    stacklevel=2,
                )
    for dataset in config["finetune"]["datasets"]:
        if dataset not in config["datasets"]:
            raise UserError(f"Configuration: finetune.datasets names {dataset!r}, which is not a dataset.")
    for dataset in config["datasets"]:
        _check_finetune(config, dataset, root)


def _check_along(config: dict[str, Any], name: str) -> None:
    """Whoever writes the text of an agent's episodes is an agent, trained before it."""
    way = [name]
    while along := config["agents"][way[-1]].get("along"):
        if along["agent"] not in config["agents"]:
            raise UserError(
                f"Configuration: agents.{way[-1]}.along names {along['agent']!r}, which is not an agent."
            )
        way.append(along["agent"])
        if way[-1] in way[:-1]:
            raise UserError(
                f"Configuration: agents.{name}.along goes in a circle ({' along '.join(way)}); "
                "begin with an agent without along."
            )


def _check_costs(config: dict[str, Any], name: str) -> None:
    for model, costs in config["agents"][name]["reward"].get("costs", {}).items():
        where = f"Configuration: agents.{name}.reward.costs"
        if model not in config["models"]:
            raise UserError(f"{where} names {model!r}, which is not a model.")
        points = points_of(config["models"][model])
        if len(costs) != len(points) - 1:
            raise UserError(
                f"{where}.{model} has {len(costs)} numbers, but needs {len(points) - 1}, one for each of the "
                f"exit points {list(points)} but the first."
            )


def _check_finetune(config: dict[str, Any], dataset: str, root: Path) -> None:
    from greencode.models import check_window, read_config

    block = finetune_of(config, dataset)
    if block["launcher"] == "in-process" and (block["processes"] > 1 or block["fsdp"]):
        raise UserError(
            "Configuration: finetune.processes and finetune.fsdp need finetune.launcher: accelerate."
        )
    if block["fsdp"] and (block["processes"] == 1 or config["device"] == "cpu"):
        raise UserError(
            "Configuration: finetune.fsdp shards a model over GPUs; it needs two or more processes."
        )
    made = pretrained(config)
    for model in config["models"].values():
        if model.get("path") in made:
            window = {"max_position_embeddings": config["pretrain"]["context"]}
        elif "path" in model:
            window = read_config(root / model["path"])
        else:
            continue  # known once it is fetched; the job asks again
        check_window(window, block["sequence_length"], model["path"])


def _check_source(name: str, source: dict[str, Any], root: Path) -> None:
    where = f"Configuration: datasets.{name}.source"
    if source["kind"] == "hub":
        if "name" not in source:
            raise UserError(f"{where} of kind hub needs name, a dataset id or folder.")
        return
    path = source.get("path")
    if path is None:
        raise UserError(f"{where} of kind {source['kind']} needs path.")
    if path not in ("python-stdlib", "jdk") and not (root / path).exists():
        raise UserError(f"{where}.path: {path} does not exist.")


def pretrained(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shapes of the base models that this configuration makes itself, by their folder."""
    shapes = config.get("pretrain", {}).get("models", {})
    return {f"results/pretrain/{name}": shape for name, shape in shapes.items()}


def _check_layers(name: str, model: dict[str, Any], found: int) -> None:
    if found != model["layers"]:
        raise UserError(
            f"Configuration: models.{name}.layers is {model['layers']}, but {model['path']} has {found}."
        )


def _check_model(name: str, model: dict[str, Any], root: Path) -> None:
    from greencode.models import check_weights, layer_count, read_config

    if ("path" in model) == ("hub" in model):
        raise UserError(f"Configuration: models.{name} needs either path or hub.")
    if "path" in model:
        _check_layers(name, model, layer_count(read_config(root / model["path"])))
        check_weights(root / model["path"])


def points_of(model: dict[str, Any]) -> tuple[int, ...]:
    """Exit points of a model's configuration block."""
    if model["exit_points"]:
        return check_exit_points(model["exit_points"], model["layers"])
    return exit_points(model["layers"])


def reward_of(config: dict[str, Any], agent: str, dataset: str) -> dict[str, float]:
    """Reward coefficients of an agent on a dataset."""
    block = config["agents"][agent]
    reward = block["reward"] | block["datasets"].get(dataset, {})
    return {name: value for name, value in reward.items() if name != "costs"}


def agent_of(config: dict[str, Any], agent: str, model: str, dataset: str) -> dict[str, Any]:
    """All that the training of an agent for a model on a dataset depends on, but for the seed."""
    block = {k: v for k, v in config["agents"][agent].items() if k not in ("reward", "datasets", "seeds")}
    costs = config["agents"][agent]["reward"].get("costs", {})
    named = {"costs": costs[model]} if model in costs else {}
    return block | {"reward": reward_of(config, agent, dataset) | named}


def seeds_of(config: dict[str, Any], agent: str) -> list[int]:
    """Seeds that an agent is trained with; the first one's is the agent of all other stages."""
    return config["agents"][agent]["seeds"] or [config["seed"]]


def finetune_of(config: dict[str, Any], dataset: str) -> dict[str, Any]:
    """Fine-tuning settings on a dataset."""
    block = {k: v for k, v in config["finetune"].items() if k != "datasets"}
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))["properties"]["finetune"]
    merged = _fill(block | config["finetune"]["datasets"].get(dataset, {}), schema)
    return {k: v for k, v in merged.items() if k != "datasets"}


def code_of(script: str | Path) -> str:
    """Hash of a script and of every `greencode` module that it imports, directly or not.

    Snakemake sees only the script; with this among a rule's params an edit of a module re-runs the rules
    that use it, and no others.
    """
    seen: dict[str, str] = {}
    todo = [Path(script)]
    while todo:
        path = todo.pop()
        if path.name in seen or not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        seen[path.name] = hashlib.sha256(text.encode()).hexdigest()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("greencode"):
                inner = node.module.removeprefix("greencode").lstrip(".")
                names = [inner] if inner else [alias.name for alias in node.names]
                todo += [ROOT / "greencode" / f"{name}.py" for name in names]
    return hashlib.sha256(repr(sorted(seen.items())).encode()).hexdigest()[:16]


def options_markdown() -> str:
    """Every key of the schema as Markdown tables, one per top-level block, for config/README.md.

    `*` in a key stands for a name that the study chooses.
    """
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    tables: dict[str, list[str]] = {"Top level": []}
    for name, part in schema["properties"].items():
        title = f"`{name}`" if part.get("type") == "object" else "Top level"
        tables.setdefault(title, []).extend(_option_rows(name, part, name in schema["required"]))
    head = "| key | value | default | meaning |\n|---|---|---|---|\n"
    return "\n".join(f"## {title}\n\n{head}{''.join(rows)}" for title, rows in tables.items())


def _option_rows(path: str, part: dict[str, Any], required: bool = False) -> list[str]:
    """Table rows of a key and of the keys below it."""
    if "$ref" in part:
        part = {"type": "object", "description": f"Keys of `{part['$ref'].rpartition('/')[2]}`."}
    default = "" if part.get("default") == {} else part.get("default", "")
    shown = default if isinstance(default, str) else json.dumps(default)
    cells = [f"`{path}`", _kind(part), "required" if required else shown and f"`{shown}`"]
    rows = []
    if "description" in part:
        meaning = part["description"].replace("<", "\\<").replace("|", "\\|")
        rows = ["| " + " | ".join([*cells, meaning]) + " |\n"]
    for name, inner in part.get("properties", {}).items():
        rows += _option_rows(f"{path}.{name}", inner, name in part.get("required", []))
    if isinstance(part.get("additionalProperties"), dict):
        rows += _option_rows(f"{path}.*", part["additionalProperties"])
    return rows


def _kind(part: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "enum" in part:
        return " or ".join(f"`{value}`" for value in part["enum"])
    if part["type"] == "array":
        count = f"{part['minItems']} x" if "maxItems" in part else "list of"
        return f"{count} {_kind(part['items'])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    kind = {"object": "block", "boolean": "true or false"}.get(part["type"], part["type"])
    return ", ".join([kind, *(f"{sign} {part[key]}" for key, sign in signs.items() if key in part)])
