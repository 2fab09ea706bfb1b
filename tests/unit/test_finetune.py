"""Multi-exit fine-tuning: the loss by hand, the Trainer around it, interruption and repetition."""

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, TrainingArguments

from greencode import config, models
from greencode.corpus import Record
from greencode.errors import UserError
from greencode.exits import lite_weights
from greencode.files import read_json
from greencode.finetune import (
    Blocks,
    MultiExitTrainer,
    exit_losses,
    finetune,
    last_checkpoint,
    training_blocks,
)
from greencode.launch import launch
from greencode.tokenise import load_tokenizer, pack, text_of, train_tokenizer

torch.set_num_threads(1)

VOCABULARY, LAYERS, POINTS, LENGTH = 37, 5, (2, 4, 5), 12
WEIGHTS = lite_weights(POINTS)


def make(family, seed=0, dropout=0.0):
    """A small model whose norms and projections all matter; OPT has both projections."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": LAYERS}
    common |= {"num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 1}
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=24, **common))
    else:
        model = OPTForCausalLM(OPTConfig(ffn_dim=24, word_embed_proj_dim=8, dropout=dropout, **common))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def blocks(count, seed=0):
    """Token blocks in which half of what comes next can be learned: each token is given twice."""
    draw = np.random.default_rng(seed).integers(2, VOCABULARY, size=(count, LENGTH // 2))
    return draw.repeat(2, axis=1).astype(np.int32)


def losses_by_hand(model, ids):
    """Cross-entropy at each exit from what the layers put out, and from the model's own logits at the end."""
    decoder, outputs = model.get_decoder(), []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: outputs.append(out)) for layer in decoder.layers
    ]
    final = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    losses = []
    for depth in POINTS:
        logits = final
        if depth < LAYERS:
            state = outputs[depth - 1]
            if model.config.model_type == "opt":
                state = decoder.project_out(decoder.final_layer_norm(state))
            else:
                state = decoder.norm(state)
            logits = model.lm_head(state)
        nats = -logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
        losses.append(nats.mean())
    return torch.stack(losses)


def ids_of(data):
    return torch.from_numpy(data.astype(np.int64))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("recompute", [False, True])
def test_exit_losses_by_hand(family, recompute):
    model, ids = make(family), ids_of(blocks(3))
    expected = losses_by_hand(model, ids)
    assert len({round(loss, 3) for loss in expected.tolist()}) == len(POINTS)  # else nothing is tested
    torch.testing.assert_close(exit_losses(model, ids, POINTS, recompute), expected)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_recomputing_changes_neither_losses_nor_gradients(family):
    ids, found = ids_of(blocks(3)), []
    for recompute in (False, True):
        model = make(family)
        losses = exit_losses(model, ids, POINTS, recompute)
        (torch.tensor(WEIGHTS) * losses).sum().backward()
        found.append((losses.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (losses, gradients), (again, recomputed) = found
    torch.testing.assert_close(losses, again, rtol=0, atol=0)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, recomputed[name])


def trainer_of(model, data, folder, weights=WEIGHTS, **arguments):
    defaults = {"learning_rate": 1e-3, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3}
    return MultiExitTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(defaults | arguments)),
        train_dataset=Blocks(data),
        points=POINTS,
        weights=weights,
        recompute=False,
    )


def test_the_loss_is_the_weighted_mean_of_equation_1(tmp_path):
    model, data = make("llama"), blocks(2)
    trainer = trainer_of(model, data, tmp_path, weights=(3.0, 2.0, 1.0))
    ids = ids_of(data)
    first, second, last = losses_by_hand(model, ids)
    loss, each = trainer.compute_loss(model, {"input_ids": ids}, return_outputs=True)
    torch.testing.assert_close(loss, (3 * first + 2 * second + last) / 6)
    torch.testing.assert_close(each, torch.stack([first, second, last]))


def test_the_gradient_is_that_of_equation_1(tmp_path):
    model, data = make("opt"), blocks(2)
    (torch.tensor(WEIGHTS) * losses_by_hand(model, ids_of(data))).sum().backward()
    expected = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm().item()
    once = {"max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1}
    trainer = trainer_of(make("opt"), data, tmp_path, **once)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_accumulating_two_batches_of_one_is_one_batch_of_two(tmp_path):
    logs, models_ = [], []
    for batch, accumulation in ((2, 1), (1, 2)):
        trainer = trainer_of(
            make("llama"), blocks(8), tmp_path, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, logging_steps=1, num_train_epochs=1,
        )  # fmt: skip
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        models_.append(trainer.model.state_dict())
    assert len(logs[0]) == len(logs[1]) == 4
    for one, two in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "exit_2", "exit_4", "exit_5"):
            assert one[key] == pytest.approx(two[key], rel=1e-3), key
    for name, weight in models_[0].items():
        torch.testing.assert_close(weight, models_[1][name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for family in ("llama", "opt"):
        models.save(make(family, dropout=0.1), folder / family)
        (folder / family / "tokenizer.json").write_text("{}")
    return folder


def settings_of(**other):
    study = config.complete({"datasets": {"d": {"language": "java", "source": {"kind": "tree"}}},
                             "models": {"m": {"layers": LAYERS}}, "agents": {}})  # fmt: skip
    small = {"exit_points": list(POINTS), "batch_size": 2, "accumulation": 1, "learning_rate": 3e-3}
    often = {"max_steps": 6, "log_every": 1, "evaluate_every": 3, "save_every": 2}
    return config.finetune_of(study, "d") | small | often | other


def run(base, folder, seed=1, train=None, **other):
    """Fine-tune and give the loss curve's file; the model lies in `folder / "out"`."""
    train = blocks(12) if train is None else train
    settings = settings_of(**other)
    finetune(base, train, blocks(3, seed=9), settings, seed, "cpu", 1, folder / "checkpoints", folder / "out")
    return read_json(folder / "out" / "loss_curve.json")


def weights_of(folder):
    return load_file(folder / "out" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(bases, tmp_path_factory):
    """One uninterrupted run, with dropout, so that random states matter too."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(bases / "opt", folder)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_validation_before_is_that_of_the_base_model_by_hand(bases, tmp_path, family):
    report = run(bases / family, tmp_path, max_steps=1)["validation_before"]
    model, ids = models.load(bases / family), ids_of(blocks(3, seed=9))
    expected = losses_by_hand(model, ids)
    assert [report[f"exit_{point}"] for point in POINTS] == pytest.approx(expected.tolist(), rel=1e-4)
    assert report["loss"] == pytest.approx(np.dot(WEIGHTS, expected.tolist()), rel=1e-4)
    with torch.inference_mode():
        hits = model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert report[f"accuracy_{LAYERS}"] == pytest.approx(hits.float().mean().item())


def test_the_loss_of_every_exit_falls_and_is_logged(bases, tmp_path):
    record = run(
        bases / "llama", tmp_path, train=blocks(400), max_steps=0, epochs=1.0, batch_size=8,
        learning_rate=1e-2, log_every=5, evaluate_every=20, save_every=50,
    )  # fmt: skip
    before, after = record["validation_before"], record["validation_after"]
    for point in POINTS:
        assert after[f"exit_{point}"] < before[f"exit_{point}"] - 0.3
        assert after[f"accuracy_{point}"] > before[f"accuracy_{point}"] + 0.1
    steps = [entry for entry in record["curve"] if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(5, 51, 5))
    for entry in steps:
        exits = [entry[f"exit_{point}"] for point in POINTS]
        assert entry["loss"] == pytest.approx(np.dot(WEIGHTS, exits), rel=1e-3)
    assert [entry["step"] for entry in record["curve"] if "eval_loss" in entry] == [20, 40, 50]
    assert record["weights"] == pytest.approx(WEIGHTS)
    assert record["exit_points"] == list(POINTS)


def test_the_first_logged_loss_is_the_base_models(bases, tmp_path):
    data = blocks(4)
    record = run(bases / "llama", tmp_path, train=data, batch_size=4, max_steps=1)
    expected = losses_by_hand(models.load(bases / "llama"), ids_of(data))
    first = record["curve"][0]
    assert [first[f"exit_{point}"] for point in POINTS] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("other", "steps", "seen"),
    [
        ({"max_steps": 0}, 2, 7),  # one epoch of 7 blocks, 4 in a step
        ({"max_steps": 1}, 1, 4),
        ({"max_steps": 3}, 2, 7),  # at most: the epoch ends first
        ({"max_steps": 0, "epochs": 1.5}, 3, 7 + 4),
        ({"max_steps": 4, "epochs": 9.0}, 4, 7 + 7),
    ],
)
def test_epochs_and_max_steps_both_limit_the_run(bases, tmp_path, other, steps, seen):
    record = run(bases / "llama", tmp_path, train=blocks(7), accumulation=2, **other)
    assert (record["steps"], record["tokens_seen"]) == (steps, seen * LENGTH)


def test_the_model_directory_is_complete(bases, whole):
    folder, record = whole
    assert (folder / "out" / "tokenizer.json").read_text() == "{}"
    model = models.load(folder / "out")
    before = models.load(bases / "opt").state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    expected = losses_by_hand(model, ids_of(blocks(3, seed=9))).tolist()
    found = record["validation_after"]
    assert [found[f"exit_{point}"] for point in POINTS] == pytest.approx(expected, rel=1e-4)
    assert set(found) == set(record["validation_before"])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(bases, whole, tmp_path):
    folder, record = whole
    assert run(bases / "opt", tmp_path / "again") == record
    run(bases / "opt", tmp_path / "other", seed=2)
    first, again, other = (
        (path / "out" / "model.safetensors").read_bytes()
        for path in (folder, tmp_path / "again", tmp_path / "other")
    )
    assert first == again
    assert first != other


@pytest.fixture
def steps(monkeypatch):
    """Numbers of the steps that are run; a 0 put in front stops the run at its fifth, as a kill would."""
    done, step = [], MultiExitTrainer.training_step

    def counted(self, *args, **kwargs):
        done.append(self.state.global_step + 1)
        if done[0] == 0 and done[-1] == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MultiExitTrainer, "training_step", counted)
    return done


def test_an_interrupted_run_resumes_to_the_same_model(bases, whole, tmp_path, steps):
    folder, record = whole
    steps.append(0)
    with pytest.raises(KeyboardInterrupt):
        run(bases / "opt", tmp_path)
    steps.clear()
    assert not (tmp_path / "out").exists()
    # As if killed while it saved the next checkpoint: weights without the state that is written last.
    half = tmp_path / "checkpoints" / "checkpoint-5"
    shutil.copytree(tmp_path / "checkpoints" / "checkpoint-4", half)
    (half / "trainer_state.json").unlink()
    assert run(bases / "opt", tmp_path) == record
    assert steps == [5, 6]
    for name, weight in weights_of(folder).items():
        torch.testing.assert_close(weights_of(tmp_path)[name], weight, rtol=0, atol=0)


def test_a_resumed_run_logs_the_same_means(bases, tmp_path, steps):
    """Losses are logged every third step, and a checkpoint between them would take their sums with it."""
    uneven = {"log_every": 3, "save_every": 2}
    whole = run(bases / "llama", tmp_path / "whole", **uneven)
    steps[:] = [0]
    with pytest.raises(KeyboardInterrupt):
        run(bases / "llama", tmp_path / "killed", **uneven)
    steps.clear()
    assert run(bases / "llama", tmp_path / "killed", **uneven) == whole
    assert steps == [4, 5, 6]


def test_a_run_killed_after_its_last_step_only_writes_its_results(bases, whole, tmp_path, steps):
    folder, record = whole
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    assert run(bases / "opt", tmp_path) == record
    assert steps == []
    assert all(torch.equal(weight, weights_of(folder)[name]) for name, weight in weights_of(tmp_path).items())


def in_each_process(arguments, stop):
    """Fine-tune, up to step `stop` if given. With FSDP on CPUs: torch has it, accelerate on GPUs only."""
    begun, step = AcceleratorState.__init__, MultiExitTrainer.training_step

    def on_cpus(self, *args, fsdp_plugin=None, **kwargs):
        begun(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def stopping(self, *args, **kwargs):
        if self.state.global_step + 1 == stop:
            raise UserError("stopped")
        return step(self, *args, **kwargs)

    def ending(self):
        wrapped = [one for one in gc.get_objects() if isinstance(one, DistributedDataParallel)]
        assert not wrapped, "one process may hang at its end"
        ended(self)

    ended, Accelerator.end_training = Accelerator.end_training, ending
    AcceleratorState.__init__, MultiExitTrainer.training_step = on_cpus, stopping
    finetune(**arguments)


def launched(base, folder, monkeypatch, stop=None, **other):
    """As `run` on 26 blocks, validated on 5, by two processes."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    settings = settings_of(launcher="accelerate", processes=2, **other)
    arguments = {
        "base": base, "train": blocks(26), "validation": blocks(5, seed=9), "settings": settings, "seed": 1,
        "device": "cpu", "threads": 1, "checkpoints": folder / "checkpoints", "out": folder / "out",
    }  # fmt: skip
    launch(in_each_process, {"arguments": arguments, "stop": stop}, 2, 1, folder)
    return read_json(folder / "out" / "loss_curve.json")


def assert_same_training(one, two, folder_of_one, folder_of_two):
    """Loss of every step and exit, and validation, within 1e-4 (logged means have four digits)."""
    assert {key: two[key] for key in ("steps", "tokens_seen")} == {
        key: one[key] for key in ("steps", "tokens_seen")
    }
    assert len(one["curve"]) == len(two["curve"]) == 8
    for first, second in zip(one["curve"], two["curve"], strict=True):
        assert second == pytest.approx(first, abs=1.01e-4)
    for name in ("validation_before", "validation_after"):
        assert two[name] == pytest.approx(one[name], abs=1e-4)
    weights = weights_of(folder_of_one)
    assert weights.keys() == weights_of(folder_of_two).keys()
    for name, weight in weights_of(folder_of_two).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)


def of_one_process(base, folder, **other):
    settings = settings_of(accumulation=2, **other)
    finetune(
        base, blocks(26), blocks(5, seed=9), settings, 1, "cpu", 1, folder / "checkpoints", folder / "out"
    )
    return read_json(folder / "out" / "loss_curve.json")


def test_two_processes_train_as_one_with_twice_the_accumulation(bases, tmp_path, monkeypatch, capfd):
    one = of_one_process(bases / "llama", tmp_path / "one")
    capfd.readouterr()
    two = launched(bases / "llama", tmp_path / "two", monkeypatch)
    assert_same_training(one, two, tmp_path / "one", tmp_path / "two")
    assert capfd.readouterr().out.count("'train_runtime'") == 1


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_go_on_from_their_checkpoint(bases, tmp_path, monkeypatch, capfd, fsdp):
    one = of_one_process(bases / "llama", tmp_path / "one")
    other = {"fsdp": fsdp, "gradient_checkpointing": True}
    with pytest.raises(UserError, match=r"^stopped$"):
        launched(bases / "llama", tmp_path / "two", monkeypatch, stop=6, **other)
    assert last_checkpoint(tmp_path / "two" / "checkpoints").name == "checkpoint-4"
    assert not (tmp_path / "two" / "out").exists()
    capfd.readouterr()
    two = launched(bases / "llama", tmp_path / "two", monkeypatch, **other)
    said = capfd.readouterr().out
    assert said.count("'loss'") == 2
    assert_same_training(one, two, tmp_path / "one", tmp_path / "two")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is wrong without a GPU")
def test_nothing_to_shard_on_is_said(bases, tmp_path):
    with pytest.raises(UserError, match=r"^finetune.fsdp: accelerate shards models on GPUs only"):
        run(bases / "llama", tmp_path, fsdp=True)


def test_a_block_longer_than_the_window_is_refused(bases, tmp_path):
    long = np.ones((4, 33), np.int32)
    with pytest.raises(UserError, match=r"sequence_length is 33, but .*llama reads at most 32 tokens"):
        run(bases / "llama", tmp_path, train=long)


def test_last_checkpoint_is_the_newest_whole_one(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    for number, state in ((9, "{}"), (10, "{}"), (11, '{"global_'), (100, None)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_gradient_checkpointing_gives_the_same_model(bases, tmp_path):
    records = [
        run(bases / "llama", tmp_path / str(saving), gradient_checkpointing=saving, max_steps=3)
        for saving in (False, True)
    ]
    assert records[0]["validation_after"] == pytest.approx(records[1]["validation_after"], rel=1e-4)
    plain = weights_of(tmp_path / "False")
    for name, weight in weights_of(tmp_path / "True").items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_trains_about_as_float32_does(bases, tmp_path, checkpointing):
    other = {"gradient_checkpointing": checkpointing, "max_steps": 3}
    reports = [run(bases / "llama", tmp_path / str(bf16), bf16=bf16, **other) for bf16 in (False, True)]
    exact, rounded = (report["validation_after"]["loss"] for report in reports)
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_saved_in_the_type_asked_for(bases, tmp_path, dtype):
    run(bases / "llama", tmp_path, save_dtype=dtype, max_steps=1)
    assert {weight.dtype for weight in weights_of(tmp_path).values()} == {getattr(torch, dtype)}
    assert models.load(tmp_path / "out").dtype == torch.float32


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([text_of(record.code) for record in records(30)], 300, 64, folder)
    return load_tokenizer(folder)


def records(count):
    return [Record(i, f"{i}.py", ["<s>", "x", "=", f"{i}", "<EOL>", "y", "</s>"]) for i in range(count)]


def test_training_blocks_hold_the_files_in_seeded_order(tokenizer):
    settings = settings_of(seed=5, sequence_length=8)
    order = np.random.default_rng(5).permutation(100)
    files = [tokenizer(f"x = {index} <EOL> y")["input_ids"] for index in order]
    found = training_blocks(tokenizer, records(100), settings, 0)
    np.testing.assert_array_equal(found, pack(files, 8))
    np.testing.assert_array_equal(training_blocks(tokenizer, records(100), settings, 7), found[:7])
    assert not np.array_equal(training_blocks(tokenizer, records(100), settings | {"seed": 6}, 0), found)


def test_too_few_tokens_for_a_block_are_named(tokenizer):
    with pytest.raises(UserError, match="fewer than one sequence of 500"):
        training_blocks(tokenizer, records(3), settings_of(seed=5, sequence_length=500), 0)
