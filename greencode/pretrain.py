"""Small base models from scratch: a tokenizer and two model shapes on a corpus of CodeXGLUE tokens.

The bundled models under resources/models come from here (`snakemake --cores all pretrain --configfile
config/pretrain.yaml`). Plain next-token loss: exits are taught later, by `greencode.finetune`.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from greencode import models
from greencode.corpus import read_corpus
from greencode.energy import Meter
from greencode.errors import UserError
from greencode.files import read_json, write_json
from greencode.results import device_name
from greencode.tokenise import encode, load_tokenizer, pack, text_of, train_tokenizer

LANGUAGES = ("java", "python")


def build_tokenizer(
    corpus: str, vocabulary: int, files_per_language: int, context: int, directory: str | Path
) -> None:
    """Byte-level BPE on an equal number of training files of each language."""
    texts = (
        text_of(record.code)
        for language in LANGUAGES
        for record in itertools.islice(read_corpus(corpus, language, "train"), files_per_language)
    )
    train_tokenizer(texts, vocabulary, context, directory)


def tokens_of(corpus: str, language: str, split: str, tokenizer_directory: str | Path) -> Iterator[list[int]]:
    """Model tokens of each file of a language, in the corpus's order."""
    tokenizer = load_tokenizer(tokenizer_directory)
    return encode(tokenizer, (record.code for record in read_corpus(corpus, language, split)))


def _take(files: Iterator[list[int]], tokens: int) -> Iterator[list[int]]:
    """Files until `tokens` tokens are reached."""
    seen = 0
    for file in files:
        if seen >= tokens:
            return
        seen += len(file)
        yield file


def build_blocks(
    corpus: str, tokenizer_directory: str | Path, block: int, tokens: int, out: str | Path
) -> None:
    """Packed blocks [n, block] of the train split as a .npy of uint16, half of the tokens from each language.

    A file that is longer than the rest of a language's budget is still taken whole.
    """
    share = tokens // len(LANGUAGES)
    parts = [
        pack(_take(tokens_of(corpus, language, "train", tokenizer_directory), share), block)
        for language in LANGUAGES
    ]
    np.save(out, np.concatenate(parts).astype(np.uint16))


def _initialise(model) -> None:
    """Start every layer as the identity: output projections at zero, other matrices at 1/sqrt(fan in).

    With transformers' default (0.02 everywhere) the layers' noise drowns the embeddings of so narrow and
    deep a model: after 200 steps it was half a nat behind (docs/base-models.md).
    """
    outputs = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")
    for name, weight in model.named_parameters():
        if name.endswith(outputs):
            weight.data.zero_()
        elif weight.dim() == 2:
            weight.data.normal_(0, weight.shape[1] ** -0.5)


def new_model(shape: dict[str, Any], vocabulary: int, context: int, bos: int, eos: int, seed: int):
    """A Llama- or OPT-shaped model with random weights and tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    common = {
        "vocab_size": vocabulary,
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "max_position_embeddings": context,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": eos,
        "tie_word_embeddings": True,
    }
    hidden, inner = shape["hidden"], shape["feed_forward"]
    if shape["family"] == "llama":
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=inner, **common))
    elif shape["family"] == "opt":
        model = OPTForCausalLM(OPTConfig(ffn_dim=inner, word_embed_proj_dim=hidden, dropout=0.0, **common))
    else:
        raise UserError(f"pretrain cannot make models of family {shape['family']!r}; use llama or opt.")
    _initialise(model)
    return model


def train_model(
    shape: dict[str, Any],
    training: dict[str, Any],
    blocks: str | Path,
    tokenizer_directory: str | Path,
    checkpoints: str | Path,
    out: str | Path,
    threads: int,
    cpu_watts: float | None = None,
) -> None:
    """Train one model over `blocks` on the Hugging Face Trainer and write a model directory.

    Interrupted, it resumes from the last checkpoint under `checkpoints`. Writes bf16 safetensors,
    the tokenizer's files and `training.json` (tokens seen, loss curve, hardware; tokens per second and
    energy since it was last resumed).
    """
    import torch
    from transformers import Trainer, TrainingArguments

    from greencode.finetune import Blocks, last_checkpoint

    torch.set_num_threads(threads)
    data = np.load(blocks, mmap_mode="r")
    tokenizer = load_tokenizer(tokenizer_directory)
    model = new_model(
        shape, len(tokenizer), training["context"], tokenizer.bos_token_id, tokenizer.eos_token_id,
        training["seed"],
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=training["epochs"],
        per_device_train_batch_size=training["batch_size"],
        learning_rate=training["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=training["warmup_steps"],
        weight_decay=training["weight_decay"],
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        bf16=training["bf16"],
        torch_compile=training["compile"],
        seed=training["seed"],
        data_seed=training["seed"],
        logging_steps=training["log_every"],
        logging_first_step=True,
        save_steps=training["save_every"],
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Blocks(data))
    last = last_checkpoint(checkpoints)
    done = read_json(last / "trainer_state.json")["global_step"] if last else 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meter = Meter.open(device, cpu_watts)
    with meter.window() as window:
        outcome = trainer.train(resume_from_checkpoint=last and str(last))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    models.save(model.to(torch.bfloat16), out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer_directory) / name, out / name)
    curve = [
        {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry["learning_rate"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    tokens = int(data.size * training["epochs"])
    since = tokens * (1 - done / trainer.state.global_step)
    write_json(
        out / "training.json",
        {
            "shape": shape,
            "training": training,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_seen": tokens,
            "tokens_per_second": round(since / outcome.metrics["train_runtime"], 1),
            "loss_curve": curve,
            "hardware": f"{device_name(device)}, {threads} threads",
            "joules": window.energy.joules,
            "energy_note": meter.note,
            "resumed": last is not None,
        },
    )


def validate_model(
    directory: str | Path, corpus: str, files_per_language: int, seed: int, threads: int
) -> None:
    """Add validation quality by language to `training.json`: next-token accuracy, cross-entropy, bits
    per source byte.

    Each validation file counts from its start up to `context` tokens; the first token of a file is
    given, not predicted. Bytes are those of the predicted tokens' text.
    """
    import torch

    torch.set_num_threads(threads)
    model = models.load(directory)
    tokenizer = load_tokenizer(directory)
    training = read_json(Path(directory) / "training.json")
    context = training["training"]["context"]
    report: dict[str, dict[str, float]] = {}
    for language in LANGUAGES:
        records = list(read_corpus(corpus, language, "validation"))
        random.Random(seed).shuffle(records)
        nats = hits = tokens = length = 0
        for ids in encode(tokenizer, (record.code for record in records[:files_per_language])):
            ids = torch.tensor([ids[:context]])
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, :-1]
            target = ids[0, 1:]
            nats += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
            hits += (logits.argmax(-1) == target).sum().item()
            tokens += len(target)
            length += len(tokenizer.decode(target).encode())
        report[language] = {
            "accuracy": hits / tokens,
            "cross_entropy_nats": nats / tokens,
            "bits_per_byte": nats / math.log(2) / length,
            "tokens": tokens,
            "bytes": length,
            "files": min(files_per_language, len(records)),
        }
    write_json(Path(directory) / "training.json", training | {"validation": report})


def _energy(training: dict[str, Any]) -> str:
    if training["joules"] is None:
        return training["energy_note"]
    since = " since the run was last resumed" if training["resumed"] else ""
    return f"{training['joules'] / 3600:.1f} Wh{since}. {training['energy_note']}"


def model_card(directory: str | Path, name: str, corpus: str) -> str:
    """The README of a bundled model, from what was recorded while it was made."""
    training = read_json(Path(directory) / "training.json")
    shape, quality = training["shape"], training["validation"]
    licences: dict[str, set[str]] = {}
    for language in LANGUAGES:
        manifest = Path(corpus) / language / "manifest.json"
        if manifest.exists():
            for source in read_json(manifest)["sources"]:
                if source.get("split", "train") != "train":
                    continue
                licences.setdefault(source.get("licence", "unknown"), set()).add(source["repo"])
    rows = "\n".join(
        f"| {language} | {q['accuracy']:.3f} | {q['cross_entropy_nats']:.3f} | {q['bits_per_byte']:.3f} "
        f"| {q['tokens']:,} in {q['files']} files |"
        for language, q in quality.items()
    )
    sources = "\n".join(
        f"- {licence}: {', '.join(sorted(repos))}" for licence, repos in sorted(licences.items())
    )
    loss = float(training["loss_curve"][-1]["loss"])
    return f"""# {name}

A causal language model of code in the shape of {shape["family"]}: {training["parameters"] / 1e6:.2f} M
parameters, {shape["layers"]} layers, hidden size {shape["hidden"]}, context
{training["training"]["context"]} tokens, byte-level BPE. Made by
`snakemake --cores all pretrain --configfile config/pretrain.yaml` to give the default study a real model
that fits into a repository. It knows Java and Python as CodeXGLUE tokens joined by blanks, and nothing
else; it is not meant for use outside this study.

## Training
- Tokens: {training["tokens_seen"]:,}, Java and Python in equal parts, at
  {training["tokens_per_second"]:,.0f} per second
- Hardware: {training["hardware"]}
- Final training loss: {loss:.3f} nats per token
- Energy: {_energy(training)}
- Settings and loss curve: `training.json`

## Validation (held-out files)
| language | next-token accuracy | cross-entropy (nats) | bits per byte | evaluated on |
| --- | --- | --- | --- | --- |
{rows}

## Limits
A few million parameters and little training: completions are plausible in form, seldom right in
content (docs/base-models.md). Weights are bf16 on disk and run in float32.

## Sources, by licence
{sources}
"""
