"""The bundled base models from many passes over the whole corpus, on one GPU, in one command:

    python -m benchmarks.gpu_pretrain --out results/gpu

The same code as the workflow's target `pretrain`, with the shapes of config/pretrain.yaml. Each model's
speed is measured first, and it gets as many passes as fit into its part of `--minutes`. Under `--out` it
leaves the two model directories with their cards (at most 12 MB each), and nothing else. Aim: next-token
accuracy of 0.55 on files of unseen repositories. Laid out for an H100 and not yet run on one; `--micro` runs
it in small on any machine.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from greencode import config
from greencode.files import read_json, write_text
from greencode.pretrain import build_blocks, build_tokenizer, train_model
from greencode.validate import model_card, validate_model, validate_ngrams

# All of the corpus in large steps; the shallow stage is short, since a GPU is no faster on few layers.
GPU: dict[str, Any] = {
    "tokens": 10**9,
    "tokenizer_files": 10_000,
    "batch_tokens": 65536,
    "stages": [
        {"share": 0.2, "layers": 4, "sequence": 256},
        {"share": 0.7, "layers": 16, "sequence": 512},
        {"share": 0.1, "layers": 16, "sequence": 1024},
    ],
    "learning_rate": 4e-3,
    "validation_files": 500,
    "save_every": 10**6,
}
MICRO: dict[str, Any] = {
    "tokens": 4096, "vocabulary": 300, "tokenizer_files": 20, "context": 32, "batch_tokens": 64,
    "stages": [{"share": 1, "layers": 4, "sequence": 16}, {"share": 1}], "validation_files": 5,
    "compile": False, "save_every": 10**6,
}  # fmt: skip
MICRO_SHAPE = {"hidden": 16, "heads": 2, "feed_forward": 24}


def seconds_per_step(shape, block, blocks: np.ndarray, tokenizer: Path, threads: int, scratch: Path) -> float:
    """Of the full depth at its longest sequences, compilation left out: from runs of two lengths."""
    seconds, lengths = [], (20, 80)
    for steps in lengths:
        count = max(steps * block["batch_tokens"] // block["context"], 1)
        np.save(scratch / "speed.npy", np.resize(blocks, (count, block["context"])))
        settings = block | {"stages": [], "epochs": 1.0}
        folder = scratch / f"speed-{steps}"
        start = time.monotonic()
        train_model(shape, settings, scratch / "speed.npy", tokenizer, folder, folder / "out", threads)
        seconds.append(time.monotonic() - start)
    return max(seconds[1] - seconds[0], 1e-3) / (lengths[1] - lengths[0])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", default="corpus", help="folder as in config/pretrain.yaml")
    parser.add_argument("--out", type=Path, required=True, help="for the model directories")
    parser.add_argument("--minutes", type=float, default=24, help="for everything")
    parser.add_argument("--threads", type=int, default=8, help="CPU threads")
    parser.add_argument("--micro", action="store_true", help="a run of seconds, to see that it works")
    options = parser.parse_args(arguments)
    start = time.monotonic()

    study = yaml.safe_load((config.ROOT / "config" / "config.yaml").read_text())
    study["pretrain"] = yaml.safe_load((config.ROOT / "config" / "pretrain.yaml").read_text())["pretrain"]
    study["pretrain"] |= MICRO if options.micro else GPU
    block = config.complete(study)["pretrain"] | {"corpus": options.corpus, "seed": study["seed"]}
    shapes = block.pop("models")
    if options.micro:
        shapes = {name: shape | MICRO_SHAPE for name, shape in shapes.items()}

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tokenizer, packed = scratch / "tokenizer", scratch / "train.npy"
        build_tokenizer(
            options.corpus, block["vocabulary"], block["tokenizer_files"], block["context"], tokenizer
        )
        build_blocks(options.corpus, tokenizer, block["context"], block["tokens"], block["seed"], packed)
        blocks = np.load(packed, mmap_mode="r")
        validate_ngrams(packed, tokenizer, block, scratch / "ngrams.json")
        for number, (name, shape) in enumerate(shapes.items()):
            spent = time.monotonic() - start
            share = (60 * options.minutes - spent) / (len(shapes) - number)
            work = scratch / name
            work.mkdir()
            step = seconds_per_step(shape, block, blocks, tokenizer, options.threads, work)
            left = share - (time.monotonic() - start - spent)
            left *= 0.8  # the rest for compiling and validation
            passes = left / step * block["batch_tokens"] / blocks.size
            settings = block | {"epochs": 1.0 if options.micro else max(passes, 0.1)}
            out = options.out / name
            shutil.rmtree(out, ignore_errors=True)
            train_model(shape, settings, packed, tokenizer, work / "checkpoints", out, options.threads)
            validate_model(out, settings, scratch / "ngrams.json", options.threads, out / "validation.json")
            write_text(out / "README.md", model_card(out, name, options.corpus))
            quality = read_json(out / "validation.json")
            print(
                f"{name}: {settings['epochs']:.1f} passes, accuracy "
                f"{quality['model']['overall']['accuracy']:.3f} (5-gram "
                f"{quality['ngrams']['overall']['accuracy']:.3f}), "
                f"{(time.monotonic() - start) / 60:.1f} minutes so far",
                flush=True,
            )


if __name__ == "__main__":
    main()
