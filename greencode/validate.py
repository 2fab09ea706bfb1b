"""What a base model from scratch is worth: validation quality, beside counting alone, and its card."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from greencode import models
from greencode.corpus import read_corpus
from greencode.files import read_json, write_json
from greencode.ngram import KneserNey
from greencode.pretrain import LANGUAGES
from greencode.tokenise import encode, load_tokenizer


def quality_of(
    score: Callable[[list[int]], tuple[float, int]],
    tokenizer,
    training: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """Next-token accuracy, cross-entropy and bits per source byte on validation files, by language and
    `overall` (all their tokens together).

    `score` gives nats and correct predictions over the tokens of a file after its first, which is given, not
    predicted. `training`, the configuration's pretrain block with the seed, says which files; each counts
    from its start up to `context` tokens. Bytes are those of the predicted tokens' text.
    """
    report: dict[str, dict[str, float]] = {}
    sums = np.zeros((len(LANGUAGES), 5))  # nats, hits, tokens, bytes, files
    for row, language in zip(sums, LANGUAGES, strict=True):
        records = list(read_corpus(training["corpus"], language, "validation"))
        random.Random(training["seed"]).shuffle(records)
        for ids in encode(tokenizer, (record.code for record in records[: training["validation_files"]])):
            ids = ids[: training["context"]]
            nats, hits = score(ids)
            row += (nats, hits, len(ids) - 1, len(tokenizer.decode(ids[1:]).encode()), 1)
    for name, row in (("overall", sums.sum(0)), *zip(LANGUAGES, sums, strict=True)):
        nats, hits, tokens, length, files = row.tolist()
        report[name] = {
            "accuracy": hits / tokens,
            "cross_entropy_nats": nats / tokens,
            "bits_per_byte": nats / math.log(2) / length,
            "tokens": int(tokens),
            "bytes": int(length),
            "files": int(files),
        }
    return report


def validate_ngrams(
    blocks: str | Path, tokenizer_directory: str | Path, training: dict[str, Any], out: str | Path
) -> None:
    """Validation quality of a 5-gram model of the same tokens, which the base models have to beat."""
    tokenizer = load_tokenizer(tokenizer_directory)
    model = KneserNey(np.load(blocks), len(tokenizer))

    def score(ids: list[int]) -> tuple[float, int]:
        rows = list(zip(model.distributions(ids), ids[1:], strict=True))
        return -sum(math.log(p[token]) for p, token in rows), sum(p.argmax() == token for p, token in rows)

    write_json(out, quality_of(score, tokenizer, training))


def validate_model(
    directory: str | Path, training: dict[str, Any], ngrams: str | Path, threads: int, out: str | Path
) -> None:
    """Validation quality of a trained model (`model`), beside that of the n-gram model (`ngrams`)."""
    import torch

    torch.set_num_threads(threads)
    model = models.load(directory)

    def score(ids: list[int]) -> tuple[float, int]:
        batch = torch.tensor([ids])
        with torch.inference_mode():
            logits = model(input_ids=batch).logits[0, :-1]
        target = batch[0, 1:]
        nats = torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        return nats, (logits.argmax(-1) == target).sum().item()

    quality = quality_of(score, load_tokenizer(directory), training)
    write_json(out, {"model": quality, "ngrams": read_json(ngrams)})


def _speed(training: dict[str, Any]) -> str:
    speed = training["tokens_per_second"]
    return f", at {speed:,.0f} per second" if speed else ""


def _energy(training: dict[str, Any]) -> str:
    if training["joules"] is None:
        return training["energy_note"]
    since = " since the run was last resumed" if training["resumed"] else ""
    return f"{training['joules'] / 3600:.1f} Wh{since}. {training['energy_note']}"


def model_card(directory: str | Path, name: str, corpus: str) -> str:
    """The README of a bundled model, from what was recorded while it was made."""
    training = read_json(Path(directory) / "training.json")
    shape, quality = training["shape"], read_json(Path(directory) / "validation.json")
    licences: dict[str, set[str]] = {}
    for language in LANGUAGES:
        manifest = Path(corpus) / language / "manifest.json"
        if manifest.exists():
            for source in read_json(manifest)["sources"]:
                if source.get("split", "train") != "train":
                    continue
                licences.setdefault(source.get("licence", "unknown"), set()).add(source["repo"])
    pairs = [(part, quality["model"][part], quality["ngrams"][part]) for part in ("overall", *LANGUAGES)]
    rows = "\n".join(
        f"| {part} | {q['accuracy']:.3f} | {q['cross_entropy_nats']:.3f} | {q['bits_per_byte']:.3f} "
        f"| {n['accuracy']:.3f} | {n['bits_per_byte']:.3f} | {q['tokens']:,} in {q['files']} files |"
        for part, q, n in pairs
    )
    context = training["training"]["context"]
    stages = "; ".join(
        f"{stage['layers']} layers on {stage['blocks'] * context / 1e6:.1f} M tokens in sequences of "
        f"{stage['sequence']}{', every exit' if stage.get('exits') else ''}"
        for stage in training["stages"]
    )
    ahead = quality["model"]["overall"]["accuracy"] - quality["ngrams"]["overall"]["accuracy"]
    against = (
        f"{abs(100 * ahead):.1f} points of accuracy {'above' if ahead > 0 else 'BELOW'} a 5-gram model "
        "(interpolated Kneser-Ney) of the same training tokens."
    )
    sources = "\n".join(
        f"- {licence}: {', '.join(sorted(repos))}" for licence, repos in sorted(licences.items())
    )
    loss = float(training["loss_curve"][-1]["loss"])
    return f"""# {name}

A causal language model of code in the shape of {shape["family"]}: {training["parameters"] / 1e6:.2f} M
parameters, {shape["layers"]} layers, hidden size {shape["hidden"]}, context
{context} tokens, byte-level BPE. Made by
`snakemake --cores all pretrain --configfile config/pretrain.yaml` to give the default study a real model
that fits into a repository. It knows Java and Python as CodeXGLUE tokens joined by blanks, and nothing
else; it is not meant for use outside this study.

## Training
- Data: source files of the repositories below, their CodeXGLUE tokens (raw variant, no comments)
- Tokens: {training["tokens_seen"]:,} of this model's, Java and Python in equal parts{_speed(training)}
- Stages: {stages}
- Hardware: {training["hardware"]}
- Final training loss: {loss:.3f} nats per token
- Energy: {_energy(training)}
- Settings and loss curve: `training.json`

## Validation (files of repositories that were not trained on)
| language | next-token accuracy | nats per token | bits per byte | 5-gram: accuracy | bits per byte | on |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

{against}

## Limits
A few million parameters: completions are plausible in form, often wrong in content
(docs/base-models.md). Java and Python without comments or indentation only, as the training data
has them; what it writes may repeat code of the repositories below. Weights are bf16 on disk and run in
float32.

## Sources, by licence
{sources}
"""
