"""A study of a minute: sources, a model with random weights, and the config that goes with them."""

import contextlib
import os
import random
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from greencode.lexing import encode_tokens, plain_tokens
from greencode.tokenise import text_of, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "datasets": {"code": {"language": "python", "source": {"kind": "tree", "path": "sources"}}},
    "models": {"tiny": {"path": "model", "layers": 8}},
    "data": {"fractions": [0.6, 0.2, 0.2]},
    "finetune": {
        "sequence_length": 64,
        "accumulation": 1,
        "learning_rate": 0.003,
        "max_blocks": 20,
        "validation_blocks": 4,
        "log_every": 1,
        "evaluate_every": 2,
        "save_every": 2,
    },
    "trajectories": {"train_episodes": 16, "validation_episodes": 8, "new_tokens": 5, "batch_size": 8},
    "agents": {"agent": {"preset": "small", "steps": 2048, "environments": 4, "seeds": [1, 2]}},
    "thresholds": [0.5],
    "targets": {"agreement": [0.25]},
    "frontier": {
        "rules": {
            **{kind: {"kind": kind} for kind in ("confidence", "patience", "random", "classifier")},
            "tuned": {"kind": "stopping", "hidden": [4], "epochs": 2},
        },
        "shares": [0.7],
        "samples": 3,
        "verified": {"agent": [0.7]},
    },
    "calibration": {"saving": [0.1], "agreement": [0.5]},
    "generate": {"samples": 4, "warmup": 1, "idle_seconds": 0},
    "overhead": {"samples": 2, "repeats": 1},
    "evaluate": {"resamples": 50},
    "figures": {"dpi": 60},
}


def source_files(number=60):
    """Small Python files, all different."""
    draw = random.Random(0)
    for index in range(number):
        lines = []
        for function in range(draw.randint(6, 12)):
            name, other = draw.sample(["count", "total", "item", "value", "index", "size"], 2)
            lines += [
                f"def {name}_{index}_{function}({name}, {other}={draw.randint(0, 9)}):",
                f"    if {name} {draw.choice('<>')} {other}:",
                f"        return {name} {draw.choice('+-*')} {draw.randint(0, 9)}",
                f"    return [{other}, {name}]",
            ]
        yield "\n".join(lines) + "\n"


def prepare(study):
    """Sources, a model with random weights and its tokenizer, and the config."""
    folder, codes = study.folder / "sources", []
    folder.mkdir()
    for index, text in enumerate(source_files()):
        (folder / f"file{index:02d}.py").write_text(text)
        codes.append(encode_tokens(plain_tokens(text, "python"), "python", "raw"))
    train_tokenizer(map(text_of, codes), 400, 1024, study.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(study.folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(study.folder / "model")
    study.configure(CONFIG)
    return study


class Named(SimpleNamespace):
    """Named files that can be listed, as Snakemake's."""

    def __iter__(self):
        return iter(map(str, vars(self).values()))


def run_script(name, stub):
    """A rule's script in this process, as Snakemake runs it."""
    runpy.run_path(str(ROOT / f"workflow/scripts/{name}.py"), {"snakemake": stub}, "__main__")


@contextlib.contextmanager
def started(study):
    """A run that goes on by itself and is killed with all its jobs at the end."""
    command = [sys.executable, "-m", "snakemake", "-c2", "figures"]
    with open(study.folder / "started.txt", "w") as log:
        run = subprocess.Popen(command, cwd=study.folder, stderr=log, start_new_session=True)
    try:
        yield run
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
