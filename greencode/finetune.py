"""Weighted multi-exit fine-tuning (LITE), so that one LM head reads every exit (paper, III-D, Eq. 1)."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from greencode import models
from greencode.corpus import Record
from greencode.errors import UserError
from greencode.exits import lite_weights
from greencode.families import adapt
from greencode.files import read_json, write_json
from greencode.tokenise import encode, pack

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


def _exit_readers(
    model, ids: torch.Tensor, points: Sequence[int], positions: torch.Tensor | None = None
) -> list[Callable[[], torch.Tensor]]:
    """For each exit, a function that gives its logits [B, P - 1, V]; nothing is kept unless called.

    Each exit's hidden state goes through the final norm (and OPT's projection) and the one LM head; the
    final layer's is already normed by the model and is not normed twice.
    """
    family = adapt(getattr(model, "module", model))
    states = model(
        input_ids=ids,
        position_ids=positions,
        output_hidden_states=list(points),
        logits_to_keep=1,
        use_cache=False,
    ).hidden_states

    def reader(depth: int) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            state = states[depth][:, :-1]
            if depth == family.depth:
                return family.lm_head(state).float()
            return family.logits(family.observe(state)).float()

        return read

    return [reader(depth) for depth in points]


def exit_losses(
    model,
    ids: torch.Tensor,
    points: Sequence[int],
    recompute: bool = False,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean next-token cross-entropy [len(points)] of each exit on ids [B, P], in nats.

    `recompute` frees each exit's logits after the forward pass and computes them again in the backward
    pass: with ten exits and a vocabulary of 128,000 they would not fit into memory together.
    """
    target = ids[:, 1:].reshape(-1)

    def loss_of(read: Callable[[], torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(read().flatten(0, 1), target)

    readers = _exit_readers(model, ids, points, positions)
    return torch.stack(
        [checkpoint(loss_of, read, use_reentrant=False) if recompute else loss_of(read) for read in readers]
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
        return (loss, losses) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss and next-token accuracy of each exit on the validation blocks: `eval_exit_4`,
        `eval_accuracy_4`, ..., and their weighted mean `eval_loss`; logged as the Trainer does."""
        model = self.model.eval()
        blocks = []
        for batch in self.get_eval_dataloader(eval_dataset):
            ids = batch["input_ids"].to(self.args.device)
            target = ids[:, 1:]
            rows = []  # of each exit: loss and accuracy [B, 2]
            # Not in inference mode, whose tensors FSDP cannot use again in training.
            with torch.no_grad(), self.compute_loss_context_manager():
                for read in _exit_readers(model, ids, self.points):
                    logits = read()
                    nats = functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
                    hits = (logits.argmax(-1) == target).float()
                    rows.append(torch.stack([nats.mean(1), hits.mean(1)], dim=1))
            # All processes take equally many blocks; those taken twice to that end are left out here.
            blocks.append(self.accelerator.gather_for_metrics(torch.stack(rows, dim=1)).cpu())
        losses, hits = torch.cat(blocks).mean(0).unbind(-1)
        report = {f"{metric_key_prefix}_loss": float((self.weights * losses).sum() / self.weights.sum())}
        for point, loss, hit in zip(self.points, losses.tolist(), hits.tolist(), strict=True):
            report[f"{metric_key_prefix}_exit_{point}"] = loss
            report[f"{metric_key_prefix}_accuracy_{point}"] = hit
        self.log(dict(report))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, report)
        return report

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.exit_batches:
            means = (self.exit_sums / self.exit_batches).to(self.args.device)
            means = self.accelerator.reduce(means, "mean").tolist()
            logs.update({f"exit_{p}": round(mean, 4) for p, mean in zip(self.points, means, strict=True)})
            self.exit_sums.zero_()
            self.exit_batches = 0
        super().log(logs, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Each process saves its own; the first goes on to write the state that makes a checkpoint whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


def shard(model: PreTrainedModel, bf16: bool) -> None:
    """Shard a model's weights over all processes, in place (FSDP2): a unit per layer, the rest in the root.

    accelerate, which would do it otherwise, makes a unit of final norm and LM head. Each exit uses them,
    and after the backward pass of one their weights would be freed under the others.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in model.get_decoder().layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The Trainer's newest checkpoint that is whole, or None.

    The Trainer writes `trainer_state.json` last: a job killed while saving leaves a checkpoint without.
    """
    found = {int(path.name.rpartition("-")[2]): path for path in Path(folder).glob("checkpoint-*")}
    for _, path in sorted(found.items(), reverse=True):
        try:
            read_json(path / "trainer_state.json")
        except UserError:
            continue
        return path
    return None


def training_blocks(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], settings: dict[str, Any], most: int
) -> np.ndarray:
    """Packed blocks [n, sequence_length] of a split's files in seeded order; at most `most`, if not 0."""
    order = np.random.default_rng(settings["seed"]).permutation(len(records))
    length = settings["sequence_length"]
    files, tokens = [], 0
    for ids in encode(tokenizer, (records[index].code for index in order), batch=32):
        files.append(ids)
        tokens += len(ids)
        if most and tokens >= most * length:
            break
    blocks = pack(files, length)
    return blocks[:most] if most else blocks


def finetune(
    base: str | Path,
    train: np.ndarray,
    validation: np.ndarray,
    settings: dict[str, Any],
    seed: int,
    device: str,
    threads: int,
    checkpoints: str | Path,
    out: str | Path,
) -> None:
    """Fine-tune a base model for early exit and write a model directory with its loss curve.

    Each process of a launch (see `greencode.launch`) calls it; they share every step's batch, and the first
    of them writes.

    Args:
        base: model directory, tokenizer included.
        train, validation: packed blocks [n, block] of token ids.
        settings: the configuration's `finetune` block, with `exit_points` ending at N.
        checkpoints: folder for intermediate states, keyed by the caller; an interrupted run goes on
            from the last one there.
        threads: CPU threads of each process.
        out: gets config, safetensors, tokenizer and `loss_curve.json`: training and validation loss per
            exit and step, tokens seen, weights.

    Raises:
        UserError: the model's window is shorter than a block, or there is nothing to shard on.
    """
    torch.set_num_threads(threads)
    on_gpu = device.startswith("cuda")
    last = last_checkpoint(checkpoints)
    model = models.load(base, dtype=torch.float32)
    models.check_window(model.config.to_dict(), train.shape[1], base)
    points = tuple(settings["exit_points"])
    weights = lite_weights(points, tuple(settings["budgets"]), settings["decay"])
    batch = settings["batch_size"] * settings["accumulation"] * settings["processes"]
    per_epoch = math.ceil(len(train) / batch)
    steps = math.ceil(settings["epochs"] * per_epoch)
    no_shards = UserError("finetune.fsdp: accelerate shards models on GPUs only; set it to false.")
    if settings["fsdp"] and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise no_shards  # the Trainer would refuse in words of its own
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=min(settings["max_steps"] or steps, steps),  # the Trainer's own limit overrides epochs
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["accumulation"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        warmup_steps=settings["warmup_steps"],
        weight_decay=settings["weight_decay"],
        bf16=settings["bf16"],
        activation_checkpointing=settings["gradient_checkpointing"],
        fsdp=settings["fsdp"] or None,
        fsdp_config={"auto_wrap_policy": "NO_WRAP"},  # see shard
        ddp_find_unused_parameters=False,
        seed=seed,
        data_seed=seed,
        eval_strategy="steps",
        eval_steps=settings["evaluate_every"],
        eval_on_start=last is None,  # afterwards it is in the checkpoint's history
        logging_steps=settings["log_every"],
        # On a step that is logged, or the next log of a resumed run would be the mean of fewer steps.
        save_steps=math.ceil(settings["save_every"] / settings["log_every"]) * settings["log_every"],
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
        points=points,
        weights=weights,
        recompute=settings["gradient_checkpointing"],
    )
    if last:
        print(f"Going on from {last.name}", file=sys.stderr)
    if settings["fsdp"]:
        if not trainer.is_fsdp_enabled:
            raise no_shards
        shard(model, settings["bf16"])
    trainer.train(resume_from_checkpoint=last and str(last))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole, whatever holds the shards
    if trainer.is_world_process_zero():
        tuned = models.load(base, dtype=getattr(torch, settings["save_dtype"]))
        tuned.load_state_dict(state)
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        models.save(tuned, out)
        for file in Path(base).iterdir():
            if file.name.startswith(TOKENIZER_FILES):
                shutil.copy(file, out / file.name)
        epochs, rest = divmod(trainer.state.global_step, per_epoch)
        record = {
            "exit_points": list(points),
            "weights": list(weights),
            "tokens_seen": epochs * train.size + rest * batch * train.shape[1],
            "steps": trainer.state.global_step,
        }
        write_json(out / "loss_curve.json", record | _curve(trainer.state.log_history))
    accelerator = trainer.accelerator
    # The wrapped model must not be the last to hold the group of processes: then its end waits, with the
    # interpreter's lock, for threads that may wait for the lock.
    del trainer, model
    accelerator.free_memory()
    accelerator.end_training()


def _curve(history: list[dict[str, float]]) -> dict[str, Any]:
    """Of the Trainer's log: training and validation losses by step, and the latter before and after."""
    validated = [entry for entry in history if "eval_loss" in entry]
    before, after = (
        {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
        for entry in (validated[0], validated[-1])  # the Trainer evaluates after the last step too
    )
    curve = [
        {key: value for key, value in entry.items() if key not in ("epoch", "grad_norm")}
        for entry in history
        if entry["step"] > 0 and ("loss" in entry or "eval_loss" in entry)
    ]
    return {"validation_before": before, "validation_after": after, "curve": curve}
