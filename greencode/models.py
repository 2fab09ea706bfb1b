"""Model directories: which families are supported, loading, saving, fingerprints."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greencode.errors import UserError
from greencode.files import atomic, publish, read_json, sha256, staging, write_json
from greencode.hub import conversion, snapshot

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FAMILIES = ("llama", "opt", "qwen2", "qwen3", "mistral")


def read_config(directory: str | Path) -> dict[str, Any]:
    """`config.json` of a model directory, if its family is supported.

    Raises:
        UserError: no directory, no configuration, or a family without an adapter.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a model directory; check models.*.path in the configuration.")
    config = read_json(directory / "config.json")
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise UserError(
            f"{directory} holds a model of family {family!r}, which is not supported; "
            f"supported are {', '.join(FAMILIES)}."
        )
    return config


def check_weights(directory: str | Path) -> list[Path]:
    """The safetensors files of a model directory, each complete.

    A safetensors file states its own length; a truncated one is found without reading the tensors.

    Raises:
        UserError: no safetensors, or a file shorter or longer than its header says.
    """
    directory = Path(directory)
    files = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            named = {directory / name for name in read_json(index)["weight_map"].values()}
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{index} names no weights; fetch it again.") from None
        missing = sorted(path.name for path in named if not path.exists())
        if missing:
            raise UserError(f"{directory} lacks {missing[0]}, which its index names; fetch it again.")
        files = sorted(named)
    if not files:
        raise UserError(f"{directory} holds no *.safetensors; convert the weights (pickles are not read).")
    for path in files:
        if not _is_complete(path):
            raise UserError(f"{path} is truncated or not a safetensors file; fetch it again.")
    return files


def _is_complete(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = int.from_bytes(stream.read(8), "little")
        if 8 + head > size:
            return False
        try:
            header = json.loads(stream.read(head))
            ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return False
    return 8 + head + max(ends, default=0) == size


def fingerprint(directory: str | Path) -> str:
    """Sixteen hex digits over the weights: what an agent is bound to."""
    digest = hashlib.sha256()
    for path in check_weights(directory):
        digest.update(sha256(path).encode())
    return digest.hexdigest()[:16]


def layer_count(config: dict[str, Any]) -> int:
    """N, the number of decoder layers."""
    return int(config["num_hidden_layers"])


def check_window(config: dict[str, Any], length: int, directory: str | Path) -> None:
    """`length` tokens of fine-tuning fit into the window that a model's `config.json` states.

    Raises:
        UserError: they do not.
    """
    window = config.get("max_position_embeddings")
    if window is not None and length > window:
        raise UserError(
            f"finetune.sequence_length is {length}, but {directory} reads at most {window} tokens "
            f"(max_position_embeddings); set it to {window} or less."
        )


def load(
    directory: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, attention: str = "sdpa"
) -> PreTrainedModel:
    """Load a causal LM for inference from a local directory; float32 on the CPU unless asked otherwise.

    Raises:
        UserError: unsupported family, missing or truncated weights, weights that do not fit or do not
            fill the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    read_config(directory)
    check_weights(directory)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device is 'cuda' but no CUDA device is available; set device: cpu.")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(directory),
            local_files_only=True,
            dtype=dtype or torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{directory} cannot be loaded ({str(error).splitlines()[0]}).") from None
    if report["missing_keys"]:  # transformers fills them with random numbers
        raise UserError(f"The weights in {directory} lack {min(report['missing_keys'])}; fetch them again.")
    return model.to(device).eval()


def save(model: PreTrainedModel, directory: str | Path) -> None:
    """Write config and safetensors, each file whole or not at all."""
    directory = Path(directory)
    with staging(directory / "model") as folder:
        model.save_pretrained(str(folder), safe_serialization=True)
        for file in folder.iterdir():
            publish(file, directory / file.name)


def pick_device(device: str) -> str:
    """`auto` -> cuda where there is one, else cpu; anything else unchanged."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def fetch(source: dict[str, Any], directory: str | Path) -> None:
    """Bring a base model into `directory` and write `info.json`, what Table II and later rules need.

    Args:
        source: a `models` entry of the configuration: `path` (local, copied) or `hub` and `revision`
            (downloaded into the hub's cache, then copied), `layers` to check against.

    Raises:
        UserError: not a usable model, another number of layers, or no access to the hub.
    """
    directory = Path(directory)
    origin = Path(source["path"]) if "path" in source else _download(source["hub"], source["revision"])
    config = read_config(origin)
    if layer_count(config) != source["layers"]:
        raise UserError(f"{origin} has {layer_count(config)} layers, not {source['layers']} as configured.")
    weights = check_weights(origin)
    shutil.rmtree(directory, ignore_errors=True)  # another source's files, or halves of a killed job
    directory.mkdir(parents=True)
    names = {path.name for path in weights} | {
        path.name
        for path in origin.iterdir()
        if path.is_file() and path.suffix in (".json", ".model", ".txt", ".md") and path.name != "info.json"
    }
    for name in sorted(names):
        with atomic(directory / name) as temporary:
            shutil.copyfile(origin / name, temporary)
    write_json(
        directory / "info.json",
        {
            "source": {key: source[key] for key in ("path", "hub", "revision") if key in source}
            | ({"commit": origin.name} if "hub" in source else {}),
            "family": config["model_type"],
            "layers": source["layers"],
            "hidden": config["hidden_size"],
            "exit_points": source["exit_points"],
            "parameters": _parameters(weights),
            "fingerprint": fingerprint(directory),
            "files": {name: sha256(directory / name) for name in sorted(names)},
        },
    )


def _parameters(files: list[Path]) -> int:
    """Number of stored weights; tied ones are stored once."""
    total = 0
    for path in files:
        with open(path, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return total


# The hub's repositories also hold other formats and training states; those in folders are never needed.
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.md")


def _download(name: str, revision: str) -> Path:
    """A snapshot of a hub model in the local cache (HF_HOME); its name is the commit."""
    folder = snapshot(name, revision, "model", _FILES, ["*/*"])
    if not any(folder.glob("*.safetensors")):
        request = conversion(name)
        advice = (
            f"its pull request {request} adds them: look at it and set revision: {request}"
            if request
            else "name a revision that has, or convert them (docs/hub.md)"
        )
        raise UserError(f"{name} holds no safetensors at {revision}, and pickles are not read; {advice}.")
    return folder
