"""Small base models from scratch: a tokenizer and two model shapes on a corpus of CodeXGLUE tokens.

So the bundled models under resources/models were made (docs/base-models.md):
`snakemake --cores all pretrain --configfile config/pretrain.yaml`. Plain next-token loss: exits are taught
later, by `greencode.finetune`, unless a stage asks for them. Training goes through stages of growing depth
and sequence length under one learning-rate schedule; what each choice is worth stands in
docs/base-models.md.
"""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from greencode import models
from greencode.corpus import Record, read_corpus
from greencode.energy import Meter
from greencode.errors import UserError
from greencode.exits import exit_points
from greencode.files import read_json, write_json
from greencode.memory import keep_freed
from greencode.results import device_name
from greencode.tokenise import encode, load_tokenizer, pack, text_of, train_tokenizer

LANGUAGES = ("java", "python")
POSITION_SCALE = 0.005


def _training_files(corpus: str, language: str, held_back: int) -> Iterator[Record]:
    """Files of the train split in the corpus's order, without the last `held_back`."""
    waiting: deque[Record] = deque()
    for record in read_corpus(corpus, language, "train"):
        waiting.append(record)
        if len(waiting) > held_back:
            yield waiting.popleft()


def build_tokenizer(
    corpus: str,
    vocabulary: int,
    files_per_language: int,
    context: int,
    directory: str | Path,
    held_back: int = 0,
) -> None:
    """Byte-level BPE on an equal number of training files of each language."""
    texts = (
        text_of(record.code)
        for language in LANGUAGES
        for record in itertools.islice(_training_files(corpus, language, held_back), files_per_language)
    )
    train_tokenizer(texts, vocabulary, context, directory)


def _take(files: Iterator[list[int]], tokens: int) -> Iterator[list[int]]:
    """Files until `tokens` tokens are reached."""
    seen = 0
    for file in files:
        if seen >= tokens:
            return
        seen += len(file)
        yield file


def build_blocks(
    corpus: str,
    tokenizer_directory: str | Path,
    block: int,
    tokens: int,
    seed: int,
    out: str | Path,
    held_back: int = 0,
) -> None:
    """Packed blocks [n, block] of the train split as a .npy of uint16, half of the tokens from each language,
    in seeded order so that any run of blocks is a sample of both.

    A file that is longer than the rest of a language's budget is still taken whole; a language that runs out
    of files has a smaller share. The last `held_back` files of each language are for others.
    """
    tokenizer, share = load_tokenizer(tokenizer_directory), tokens // len(LANGUAGES)

    def blocks_of(language: str) -> np.ndarray:
        codes = (record.code for record in _training_files(corpus, language, held_back))
        return pack(_take(encode(tokenizer, codes), share), block).astype(np.uint16)

    blocks = np.concatenate([blocks_of(language) for language in LANGUAGES])
    np.save(out, np.random.default_rng(seed).permutation(blocks))


# The matrices whose output is added to the residual stream.
_OUTPUTS = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")


def _initialise(model) -> None:
    """Start every layer as the identity: output projections at zero, other matrices at 1/sqrt(fan in).

    With transformers' default (0.02 everywhere) the layers' noise drowns the embeddings of so narrow and
    deep a model. OPT's learned positions start far smaller than its token embeddings, or they drown those.
    """
    for name, weight in model.named_parameters():
        if name.endswith(_OUTPUTS):
            weight.data.zero_()
        elif name.endswith("embed_positions.weight"):
            weight.data.normal_(0, POSITION_SCALE)
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


def grow(small, big, between: bool) -> None:
    """Copy `small` into `big`, whose other layers are the identity: both then compute the same function.

    The old layers stay at the bottom, or are spread evenly with the new ones `between` them.
    """
    ratio = big.config.num_hidden_layers // small.config.num_hidden_layers if between else 1
    weights = big.state_dict()  # its tensors are the model's own
    for name, weight in small.state_dict().items():
        parts = name.split(".")
        if "layers" in parts:
            number = parts.index("layers") + 1
            parts[number] = str(int(parts[number]) * ratio)
        weights[".".join(parts)].copy_(weight)


def optimiser_of(model, learning_rate: float, weight_decay: float):
    """Muon for the layers' matrices and AdamW for embeddings, norms and biases, as one optimiser.

    Muon's steps have the root mean square of AdamW's (`0.2 sqrt(longer side)`, arXiv 2502.16982), so that one
    learning rate serves both.
    """
    import torch

    class MuonAdamW(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure=None):
            group = self.param_groups[0]
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():  # all matrices of a shape at once
                for weight in weights:
                    if not self.state[weight]:  # AdamW wants to find a `step` when a checkpoint is loaded
                        self.state[weight] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(weight)}
                gradient = torch.stack([weight.grad for weight in weights])
                momenta = [self.state[weight]["momentum"] for weight in weights]
                momentum = torch.stack(momenta).lerp_(gradient, 0.05)
                torch._foreach_copy_(momenta, list(momentum.unbind()))
                update = _orthogonal(gradient.lerp(momentum, 0.95))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                size = -0.2 * max(shape) ** 0.5 * group["lr"]
                torch._foreach_add_(weights, list(update.to(gradient.dtype).unbind()), alpha=size)
                for weight in weights:
                    weight.grad = None  # AdamW passes over it
            super().step(closure)

    def role(name: str, weight) -> int:
        return 2 if weight.dim() < 2 else 1 if "embed" in name else 0

    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, weight in model.named_parameters():
        groups[role(name, weight)]["params"].append(weight)
    return MuonAdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def _orthogonal(matrices):
    """The nearest orthogonal matrices to [n, rows, columns], by five Newton-Schulz steps in bf16."""
    import torch

    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT.contiguous() if tall else x
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def stages_of(shape: dict[str, Any], training: dict[str, Any], blocks: int) -> list[dict[str, int]]:
    """The stages of a training, each with layers, sequence, steps, and `first` and `blocks` (of `context`
    tokens each): which of the run's blocks it sees; a run of several epochs numbers them on. `exits` and
    `learning_rate` are passed on where they are given.

    Raises:
        UserError: depths that cannot be grown, or sequences that do not divide context and step.
    """
    context, step = training["context"], training["batch_tokens"]
    plan = training["stages"] or [{"share": 1}]
    total = sum(part["share"] for part in plan)
    whole = max(int(blocks * training["epochs"]), 1)
    stages, done, before = [], 0.0, None
    for part in plan:
        layers, sequence = part.get("layers", shape["layers"]), part.get("sequence", context)
        if layers % (before or layers):
            raise UserError(f"pretrain.stages: {layers} layers do not grow from {before}; use a multiple.")
        if context % sequence or step % sequence:
            raise UserError(
                f"pretrain.stages: a sequence of {sequence} divides not both context {context} and "
                f"batch_tokens {step}."
            )
        first, done = round(whole * done / total), done + part["share"]
        count = max(round(whole * done / total) - first, 1)
        steps = math.ceil(count * context / step)
        stages.append(
            {"layers": layers, "sequence": sequence, "steps": steps, "first": first, "blocks": count}
            | {key: part[key] for key in ("exits", "learning_rate") if part.get(key)}
        )
        before = layers
    if before != shape["layers"]:
        raise UserError(f"pretrain.stages end at {before} layers, the model has {shape['layers']}.")
    return stages


def _train_stage(model, stage, training, offset, total, data, checkpoints, device):
    """Train over one stage's blocks on the Hugging Face Trainer, from its last checkpoint if there is one.

    `offset` of `total` is the cost (steps times layers) of earlier stages. Gives the Trainer's log, the steps
    done before and the seconds of the rest.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    from greencode.finetune import Blocks, exit_losses, last_checkpoint

    exits = exit_points(stage["layers"]) if stage.get("exits") else None

    def loss_of(ids, positions):
        if exits is None:
            return model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
        return exit_losses(model, ids, exits, positions=positions).mean()

    compute = torch.compile(loss_of) if training["compile"] else loss_of
    room = training["context"] - stage["sequence"] + 1

    class LeanTrainer(Trainer):
        # The Trainer's own bf16 mode turns the logits of every step into float32 once more.
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids = inputs["input_ids"]
            # OPT learns each position by itself: short sequences start anywhere, so that none is left out.
            start = torch.randint(room, (1,)) if model.config.model_type == "opt" else 0
            positions = (torch.arange(ids.shape[1]) + start).expand_as(ids).to(ids.device)
            with torch.autocast(device, torch.bfloat16, enabled=training["bf16"]):
                return compute(ids, positions)

    def factor(step: int) -> float:
        """Of the peak: each stage warms its new optimiser up; linear decay to zero over the whole cost, or
        over the stage if it has a peak of its own."""
        warm = min((step + 1) / (training["warmup_steps"] + 1), 1)
        if "learning_rate" in stage:
            return warm * max(1 - step / stage["steps"], 0)
        return warm * max(1 - (offset + step * stage["layers"]) / total, 0)

    peak = stage.get("learning_rate", training["learning_rate"])
    optimiser = optimiser_of(model, peak, training["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=stage["steps"],
        per_device_train_batch_size=training["batch_tokens"] // stage["sequence"],
        max_grad_norm=1.0,
        seed=training["seed"],
        data_seed=training["seed"],
        logging_steps=training["log_every"],
        logging_first_step=True,
        logging_nan_inf_filter=False,
        # On a step that is logged: see greencode.finetune.
        save_steps=math.ceil(training["save_every"] / training["log_every"]) * training["log_every"],
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    numbers = np.arange(stage["first"], stage["first"] + stage["blocks"]) % len(data)
    sequences = data[numbers].reshape(-1, stage["sequence"])
    trainer = LeanTrainer(
        model=model, args=arguments, train_dataset=Blocks(sequences), optimizers=(optimiser, schedule)
    )
    trainer.model_accepts_loss_kwargs = False
    last = last_checkpoint(checkpoints)
    done = read_json(last / "trainer_state.json")["global_step"] if last else 0
    if last:
        print(f"Going on from {last}", file=sys.stderr)
    outcome = trainer.train(resume_from_checkpoint=last and str(last))
    return trainer.state.log_history, done, outcome.metrics["train_runtime"]


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
    """Train one model over `blocks`, stage by stage, and write a model directory.

    Interrupted, it resumes from the last checkpoint under `checkpoints`. Writes bf16 safetensors,
    the tokenizer's files and `training.json` (tokens seen, loss curve, hardware; tokens per second and
    energy since it was last resumed).
    """
    import torch
    from safetensors.torch import load_model, save_model

    torch.set_num_threads(threads)
    keep_freed()
    checkpoints = Path(checkpoints)
    data = np.load(blocks, mmap_mode="r")
    tokenizer = load_tokenizer(tokenizer_directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = stages_of(shape, training, len(data))
    total = sum(stage["steps"] * stage["layers"] for stage in stages)
    offset, steps, since, seconds, resumed = 0, 0, 0.0, 0.0, False
    meter = Meter.open(device, cpu_watts)
    curve: list[dict[str, float]] = []
    model = None
    with meter.window() as window:
        for number, stage in enumerate(stages):
            before, model = model, new_model(
                shape | {"layers": stage["layers"]}, len(tokenizer), training["context"],
                tokenizer.bos_token_id, tokenizer.eos_token_id, training["seed"] + number,
            )  # fmt: skip
            if before is not None:
                grow(before, model, training["growth"] == "between")
            folder = checkpoints / f"stage-{number}"
            weights, record = folder / "model.safetensors", folder / "curve.json"
            if record.exists():  # written last
                load_model(model, str(weights))
                resumed = True
            else:
                # Without a mask given, sdpa and eager are the same function; on the CPU eager is faster.
                eager = device == "cpu" and not stage.get("exits")
                model.set_attn_implementation("eager" if eager else "sdpa")
                log, done, took = _train_stage(model, stage, training, offset, total, data, folder, device)
                model = model.cpu()
                seconds += took
                since += stage["blocks"] * training["context"] * (1 - done / stage["steps"])
                resumed = resumed or done > 0
                save_model(model, str(weights))
                entries = [
                    {"step": steps + e["step"], "loss": e["loss"], "learning_rate": e["learning_rate"]}
                    for e in log
                    if "loss" in e
                ]
                write_json(record, entries)
                torch.compiler.reset()
            curve += read_json(record)
            steps += stage["steps"]
            offset += stage["steps"] * stage["layers"]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    models.save(model.to(torch.bfloat16), out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer_directory) / name, out / name)
    write_json(
        out / "training.json",
        {
            "shape": shape,
            "training": training,
            "stages": stages,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_seen": sum(stage["blocks"] for stage in stages) * training["context"],
            "tokens_per_second": round(since / seconds, 1) if seconds else None,
            "loss_curve": curve,
            "hardware": f"{device_name(device)}, {threads} threads",
            "joules": window.energy.joules,
            "energy_note": meter.note,
            "resumed": resumed,
        },
    )
