"""Weighted multi-exit fine-tuning (LITE), so that one LM head reads every exit (paper, III-D, Eq. 1)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from greencode import models
from greencode.exits import lite_weights
from greencode.families import adapt
from greencode.files import write_json

TOKENIZER_FILES = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template")


class Blocks(Dataset):
    """Packed token blocks [n, block] as language-modelling examples: every token is a label."""

    def __init__(self, blocks: np.ndarray):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def exit_losses(
    model, ids: torch.Tensor, points: Sequence[int], recompute: bool = False
) -> torch.Tensor:
    """Mean next-token cross-entropy [len(points)] of each exit on ids [B, P].

    Each exit's hidden state goes through the final norm (and OPT's projection) and the one LM head;
    the final layer's is already normed by the model and is not normed twice. `recompute` frees each
    exit's logits after the forward pass and computes them again in the backward pass: with ten exits and
    a vocabulary of 128,000 they would not fit into memory together.
    """
    family = adapt(getattr(model, "module", model))
    states = model(
        input_ids=ids, output_hidden_states=list(points), logits_to_keep=1, use_cache=False
    ).hidden_states
    target = ids[:, 1:].reshape(-1)

    def loss_at(depth: int) -> torch.Tensor:
        state = states[depth][:, :-1]
        logits = family.lm_head(state) if depth == family.depth else family.logits(family.observe(state))
        return functional.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), target)

    return torch.stack(
        [checkpoint(loss_at, p, use_reentrant=False) if recompute else loss_at(p) for p in points]
    )


class MultiExitTrainer(Trainer):
    """The Hugging Face Trainer with Eq. 1 as its loss; logs the loss of each exit as `exit_{depth}`."""

    def __init__(self, *args, points: Sequence[int], weights: Sequence[float], recompute: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.points = tuple(points)
        self.weights = torch.tensor(weights)
        self.recompute = recompute
        self.exit_sums = torch.zeros(len(self.points))
        self.exit_batches = 0
        # Blocks are of equal length, so the mean over batches is the mean over tokens; the Trainer
        # divides the loss by the accumulation steps itself.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = exit_losses(model, inputs["input_ids"], self.points, self.recompute)
        if model.training:
            self.exit_sums += losses.detach().float().cpu()
            self.exit_batches += 1
        weights = self.weights.to(losses)
        loss = (weights * losses).sum() / weights.sum()
        return (loss, {"losses": losses}) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.exit_batches:
            means = (self.exit_sums / self.exit_batches).tolist()
            logs.update({f"exit_{p}": round(mean, 4) for p, mean in zip(self.points, means, strict=True)})
            self.exit_sums.zero_()
            self.exit_batches = 0
        super().log(logs, *args, **kwargs)


def finetune(
    base: str | Path,
    train: np.ndarray,
    validation: np.ndarray,
    points: Sequence[int],
    settings: dict[str, Any],
    seed: int,
    device: str,
    threads: int,
    checkpoints: str | Path,
    out: str | Path,
) -> None:
    """Fine-tune a base model for early exit and write a model directory with its loss curve.

    Args:
        base: model directory, tokenizer included.
        train, validation: packed blocks [n, block] of token ids.
        points: exit points, ending at N.
        settings: the configuration's `finetune` block.
        checkpoints: folder for intermediate states, keyed by the caller; an interrupted run goes on
            from the last one there.
        out: gets config, safetensors, tokenizer and `loss_curve.json`: training and validation loss per
            exit and step, tokens seen, weights.
    """
    torch.set_num_threads(threads)
    on_gpu = device.startswith("cuda")
    model = models.load(base, dtype=torch.float32)
    weights = lite_weights(tuple(points), tuple(settings["budgets"]), settings["decay"])
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings["epochs"],
        max_steps=settings["max_steps"] or -1,
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["accumulation"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        warmup_steps=settings["warmup_steps"],
        weight_decay=settings["weight_decay"],
        bf16=settings["bf16"],
        gradient_checkpointing=settings["gradient_checkpointing"],
        seed=seed,
        data_seed=seed,
        eval_strategy="steps",
        eval_steps=settings["evaluate_every"],
        logging_steps=settings["log_every"],
        save_steps=settings["save_every"],
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not on_gpu,
    )
    trainer = MultiExitTrainer(
        model=model,
        args=arguments,
        train_dataset=Blocks(train),
        eval_dataset=Blocks(validation),
        compute_metrics=_mean_losses,
        points=points,
        weights=weights,
        recompute=settings["gradient_checkpointing"],
    )
    checkpoints = Path(checkpoints)
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    before = _evaluate(trainer)
    trainer.train(resume_from_checkpoint=last)
    after = _evaluate(trainer)

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, settings["save_dtype"])
    models.save(trainer.accelerator.unwrap_model(trainer.model).to(dtype), out)
    for file in Path(base).iterdir():
        if file.name.startswith(TOKENIZER_FILES):
            shutil.copy(file, out / file.name)
    steps = trainer.state.global_step
    per_step = settings["batch_size"] * settings["accumulation"] * train.shape[1]
    write_json(
        out / "loss_curve.json",
        {
            "exit_points": list(points),
            "weights": list(weights),
            "tokens_seen": min(steps * per_step, int(train.size * settings["epochs"])),
            "steps": steps,
            "validation_before": before,
            "validation_after": after,
            "curve": [
                {k: v for k, v in entry.items() if k in ("step", "loss", "learning_rate") or "exit_" in k}
                for entry in trainer.state.log_history
                if "loss" in entry or "eval_loss" in entry
            ],
        },
    )
