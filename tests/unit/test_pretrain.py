"""A base model from scratch in small: tokenizer, blocks, training, validation, model card."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from benchmarks import gpu_pretrain
from greencode import models
from greencode.corpus import read_corpus
from greencode.errors import UserError
from greencode.files import read_json, write_json, write_text
from greencode.finetune import exit_losses
from greencode.ngram import KneserNey
from greencode.pretrain import (
    build_blocks,
    build_tokenizer,
    grow,
    new_model,
    stages_of,
    train_model,
)
from greencode.tokenise import encode, load_tokenizer
from greencode.validate import model_card, validate_model, validate_ngrams

torch.set_num_threads(1)

CONTEXT = 16
SHAPES = {
    family: {"family": family, "layers": 4, "hidden": 16, "heads": 2, "feed_forward": 24}
    for family in ("llama", "opt")
}
TRAINING = {
    "context": CONTEXT, "epochs": 1.0, "batch_tokens": 4 * CONTEXT, "learning_rate": 1e-2, "warmup_steps": 1,
    "weight_decay": 0.1, "bf16": False, "compile": False, "seed": 1, "log_every": 1, "save_every": 2,
    "growth": "top", "stages": [{"share": 1, "layers": 2, "sequence": 8}, {"share": 1}],
    "validation_files": 5,
}  # fmt: skip


def java(number):
    return ["<s>", "int", f"a{number}", "=", f"{number}", ";", "return", f"a{number}", ";", "}", "</s>"]


def python(number):
    return ["<s>", "def", f"f{number}", "(", ")", ":", "<EOL>", "return", f"'ü{number}'", "</s>"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for language, code in (("java", java), ("python", python)):
        for split, numbers in (("train", range(40)), ("validation", range(40, 47))):
            rows = [{"id": i, "path": f"{i}", "code": code(n)} for i, n in enumerate(numbers)]
            write_text(folder / language / f"{split}.jsonl.xz", "".join(json.dumps(r) + "\n" for r in rows))
    write_json(
        folder / "java" / "manifest.json",
        {
            "sources": [
                {"repo": "one/trained", "licence": "MIT", "split": "train"},
                {"repo": "two/trained", "licence": "Apache-2.0", "split": "train"},
                {"repo": "never/seen", "licence": "GPL-3.0", "split": "test"},
            ]
        },
    )
    write_json(folder / "python" / "manifest.json", {"sources": [{"repo": "no/split", "licence": "MIT"}]})
    return folder


def tokens_of(corpus, language, split, tokenizer):
    codes = [record.code for record in read_corpus(corpus, language, split)]
    return encode(load_tokenizer(tokenizer), codes)


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(str(corpus), 320, 30, CONTEXT, folder)
    return folder


@pytest.fixture(scope="module")
def blocks(corpus, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("blocks") / "train.npy"
    build_blocks(str(corpus), tokenizer, CONTEXT, 12 * CONTEXT, 1, path)
    return path


@pytest.fixture(scope="module", params=["llama", "opt"])
def made(request, corpus, tokenizer, blocks, tmp_path_factory):
    """A trained and validated model directory."""
    folder = tmp_path_factory.mktemp(request.param)
    out = folder / "out"
    train_model(SHAPES[request.param], TRAINING, blocks, tokenizer, folder / "checkpoints", out, 1, 15.0)
    block = TRAINING | {"corpus": str(corpus)}
    validate_ngrams(blocks, tokenizer, block, folder / "ngrams.json")
    validate_model(out, block, folder / "ngrams.json", 1, out / "validation.json")
    return out


def test_the_tokenizer_learns_from_both_languages(tokenizer):
    loaded = load_tokenizer(tokenizer)
    assert len(loaded) <= 320
    for text in ("int", " ;", " return", " <EOL>", "def"):
        assert len(loaded.tokenize(text)) == 1, text


def test_the_tokenizer_reads_so_many_files_of_each_language(corpus, tmp_path):
    """`a` and a number is a token only where files with it were read."""
    build_tokenizer(str(corpus), 320, 1, CONTEXT, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert len(loaded.tokenize(" return")) == 1
    assert len(loaded) < 320


def test_blocks_hold_the_same_share_of_each_language(corpus, tokenizer, blocks):
    data = np.load(blocks)
    assert data.dtype == np.uint16
    expected = []
    for language in ("java", "python"):
        stream = []
        for ids in tokens_of(corpus, language, "train", tokenizer):
            if len(stream) >= 6 * CONTEXT:
                break
            stream += ids
        expected += stream[: len(stream) // CONTEXT * CONTEXT]
    ordered = np.array(expected).reshape(-1, CONTEXT).tolist()
    assert sorted(data.tolist()) == sorted(ordered)
    assert data.tolist() != ordered  # both languages in every part
    assert len(data) in (12, 13, 14)  # the last file of a language is taken whole


def test_files_held_back_are_not_read(corpus, tokenizer, tmp_path):
    """Of 40 files of a language, 38 are held back."""
    build_blocks(str(corpus), tokenizer, CONTEXT, 10**6, 1, tmp_path / "train.npy", held_back=38)
    text = " ".join(load_tokenizer(tokenizer).batch_decode(np.load(tmp_path / "train.npy")))
    assert "a1 " in text
    assert "a2 " not in text
    build_tokenizer(str(corpus), 320, 30, CONTEXT, tmp_path, held_back=39)
    build_tokenizer(str(corpus), 320, 1, CONTEXT, tmp_path / "one")
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "one" / "tokenizer.json").read_bytes()


def test_a_corpus_too_small_for_one_block_is_named(corpus, tokenizer, tmp_path):
    with pytest.raises(UserError, match="fewer than one sequence of 5000"):
        build_blocks(str(corpus), tokenizer, 5000, 10_000, 1, tmp_path / "train.npy")


def test_a_missing_corpus_is_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"java/train\.jsonl does not exist"):
        build_blocks(str(tmp_path), tokenizer, CONTEXT, 100, 1, tmp_path / "train.npy")
    assert not (tmp_path / "train.npy").exists()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_new_model_has_the_shape_asked_for_and_depends_on_the_seed_alone(family):
    first, again, other = (new_model(SHAPES[family], 50, CONTEXT, 0, 1, seed) for seed in (1, 1, 2))
    assert first.config.model_type == family
    assert first.config.num_hidden_layers == 4
    assert first.config.max_position_embeddings == CONTEXT
    assert first.get_input_embeddings().weight is first.get_output_embeddings().weight
    assert first.get_input_embeddings().weight.shape == (50, 16)
    for weight, same in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, same)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        assert not torch.allclose(first(ids).logits, other(ids).logits)


def test_a_family_that_cannot_be_made_is_named():
    with pytest.raises(UserError, match="cannot make models of family 'gpt2'; use llama or opt"):
        new_model(SHAPES["llama"] | {"family": "gpt2"}, 50, CONTEXT, 0, 1, 0)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    ("between", "idle"), [(True, [False, True, False]), (False, [False, False, True])], ids=["between", "top"]
)
def test_growing_keeps_the_function(family, between, idle):
    shape = SHAPES[family]
    small, big = (new_model(shape | {"layers": n}, 50, CONTEXT, 0, 1, seed=n) for n in (2, 4))
    for weight in small.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.1)
    grow(small, big, between)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.allclose(small(ids).logits, big(ids).logits, atol=1e-5)
        states = big(ids, output_hidden_states=True).hidden_states[:4]  # the last one is normed
    assert [torch.equal(*pair) for pair in itertools.pairwise(states)] == idle


def test_stages_share_the_blocks_in_order():
    training = TRAINING | {"stages": [{"share": 3, "layers": 2, "sequence": 8}, {"share": 1}], "epochs": 2.0}
    first, second = stages_of(SHAPES["opt"], training, 10)
    assert first == {"layers": 2, "sequence": 8, "steps": 4, "first": 0, "blocks": 15}
    assert second == {"layers": 4, "sequence": 16, "steps": 2, "first": 15, "blocks": 5}
    (whole,) = stages_of(SHAPES["opt"], TRAINING | {"stages": []}, 10)
    assert whole == {"layers": 4, "sequence": 16, "steps": 3, "first": 0, "blocks": 10}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"share": 1, "layers": 3}, {"share": 1}], "4 layers do not grow from 3; use a multiple"),
        ([{"share": 1, "layers": 2}], "end at 2 layers, the model has 4"),
        ([{"share": 1, "sequence": 12}], "a sequence of 12 divides not both context 16 and batch_tokens 64"),
    ],
)
def test_stages_that_cannot_be_are_named(stages, message):
    with pytest.raises(UserError, match=message):
        stages_of(SHAPES["llama"], TRAINING | {"stages": stages}, 10)


def test_training_writes_a_model_that_loads_with_its_tokenizer(made, tokenizer, blocks):
    assert {weight.dtype for weight in load_file(made / "model.safetensors").values()} == {torch.bfloat16}
    assert (made / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert load_tokenizer(made).bos_token == "<s>"
    model = models.load(made)
    record = read_json(made / "training.json")
    assert record["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert record["tokens_seen"] == np.load(blocks).size
    blocks_of_stage = [len(np.load(blocks)) - len(np.load(blocks)) // 2, len(np.load(blocks)) // 2]
    steps = sum(math.ceil(count / 4) for count in blocks_of_stage)
    assert [entry["step"] for entry in record["loss_curve"]] == list(range(1, steps + 1))
    assert record["loss_curve"][-1]["loss"] < record["loss_curve"][0]["loss"]
    assert record["tokens_per_second"] > 0
    assert record["resumed"] is False
    assert record["shape"]["family"] == model.config.model_type
    assert record["training"] == TRAINING


def test_validation_by_hand(made, corpus, blocks, tokenizer, tmp_path):
    """All files of each language, one at a time, against the report."""
    block = TRAINING | {"corpus": str(corpus), "validation_files": 7, "seed": 3}
    validate_ngrams(blocks, tokenizer, block, tmp_path / "ngrams.json")
    validate_model(made, block, tmp_path / "ngrams.json", 1, tmp_path / "validation.json")
    report = read_json(tmp_path / "validation.json")
    assert report["ngrams"] == read_json(tmp_path / "ngrams.json")
    model, loaded = models.load(made), load_tokenizer(made)
    counted = KneserNey(np.load(blocks), len(loaded))

    def of_model(ids):
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0, :-1].softmax(-1).numpy()

    def of_ngrams(ids):
        return np.stack(list(counted.distributions(ids)))

    for kind, predict in (("model", of_model), ("ngrams", of_ngrams)):
        total = {"nats": [], "hits": [], "text": ""}
        for language in ("java", "python"):
            nats, hits, text, count = [], [], "", 0
            for ids in tokens_of(corpus, language, "validation", made):
                ids = ids[:CONTEXT]
                for row, target in zip(predict(ids), ids[1:], strict=True):
                    nats.append(-np.log(row[target]))
                    hits.append(row.argmax() == target)
                text += loaded.decode(ids[1:])
                count += 1
            check_quality(report[kind][language], nats, hits, text, count)
            total = {"nats": total["nats"] + nats, "hits": total["hits"] + hits, "text": total["text"] + text}
        check_quality(report[kind]["overall"], *total.values(), 14)


def check_quality(quality, nats, hits, text, files):
    assert (quality["files"], quality["tokens"]) == (files, len(nats))
    assert quality["bytes"] == len(text.encode())
    assert quality["cross_entropy_nats"] == pytest.approx(np.mean(nats), rel=1e-4)
    assert quality["accuracy"] == pytest.approx(np.mean(hits))
    assert quality["bits_per_byte"] == pytest.approx(sum(nats) / np.log(2) / len(text.encode()), rel=1e-4)


def test_the_model_card_has_the_numbers_and_the_licences_of_what_was_trained_on(made, corpus):
    card = model_card(made, "tiny-code", str(corpus))
    record, quality = read_json(made / "training.json"), read_json(made / "validation.json")
    assert card.startswith("# tiny-code\n")
    text = " ".join(card.split())
    for part in (
        record["shape"]["family"],
        f"{record['parameters'] / 1e6:.2f} M parameters",
        f"{record['tokens_seen']:,}",
        f"{record['loss_curve'][-1]['loss']:.3f}",
        "Stages: 2 layers on 0.0 M tokens in sequences of 8; 4 layers on 0.0 M tokens in sequences of 16",
        "- Apache-2.0: two/trained - MIT: no/split, one/trained",
    ):
        assert part in text
    for language in ("overall", "java", "python"):
        model, ngrams = quality["model"][language], quality["ngrams"][language]
        row = f"| {language} | {model['accuracy']:.3f} | {model['cross_entropy_nats']:.3f} "
        assert row + f"| {model['bits_per_byte']:.3f} | {ngrams['accuracy']:.3f} |" in card
    assert "never/seen" not in card


def test_the_model_card_says_so_if_counting_is_better(made, corpus):
    path = made / "validation.json"
    quality = read_json(path)
    for accuracy, words in (
        (0.25, "5.0 points of accuracy BELOW a"),
        (0.10, "10.0 points of accuracy above"),
    ):
        overall = quality["ngrams"]["overall"] | {"accuracy": accuracy}
        model = quality["model"]["overall"] | {"accuracy": 0.2}
        write_json(
            path,
            {
                "model": quality["model"] | {"overall": model},
                "ngrams": quality["ngrams"] | {"overall": overall},
            },
        )
        assert words in model_card(made, "m", str(corpus))
    write_json(path, quality)


def test_the_model_card_tells_how_energy_was_obtained(made, corpus):
    path = made / "training.json"
    record = read_json(path)
    write_json(path, record | {"joules": 7200.0, "energy_note": "An estimate.", "resumed": True})
    assert "Energy: 2.0 Wh since the run was last resumed. An estimate." in model_card(made, "m", str(corpus))
    write_json(path, record | {"joules": None, "energy_note": "Energy was not measured: no meter."})
    assert "Energy: Energy was not measured: no meter.\n" in model_card(made, "m", str(corpus))
    write_json(path, record)


def test_a_log_interval_longer_than_the_run_still_gives_a_loss(blocks, tokenizer, tmp_path):
    settings = TRAINING | {"log_every": 1000}
    train_model(SHAPES["llama"], settings, blocks, tokenizer, tmp_path / "checkpoints", tmp_path / "out", 1)
    record = read_json(tmp_path / "out" / "training.json")
    assert [entry["step"] for entry in record["loss_curve"]] == [1, 3]  # one a stage
    assert record["energy_note"]


@pytest.mark.parametrize("family", SHAPES)
def test_a_stage_may_train_every_exit(family, blocks, tokenizer, tmp_path):
    """The same stage with and without: only with it does the first exit learn to answer."""
    shape, losses = SHAPES[family] | {"layers": 8}, {}
    ids = torch.from_numpy(np.load(blocks)[:8].astype(np.int64))
    for name, stage in {"last": {}, "every": {"exits": True}}.items():
        stages = [{"share": 1}, {"share": 1, "learning_rate": 3e-2} | stage]
        settings = TRAINING | {"stages": stages, "epochs": 20.0}
        train_model(shape, settings, blocks, tokenizer, tmp_path / name, tmp_path / f"{name}-out", 1)
        with torch.no_grad():
            losses[name] = exit_losses(models.load(tmp_path / f"{name}-out"), ids, (4, 8)).tolist()
        record = read_json(tmp_path / f"{name}-out" / "training.json")
        assert record["stages"][1].get("exits", False) is (name == "every")
        # Its own peak, which ends near zero.
        rates = [entry["learning_rate"] for entry in record["loss_curve"]][record["stages"][0]["steps"] :]
        assert max(rates) > 2e-2
        assert rates[-1] < rates[1] / 3
    assert losses["every"][0] < losses["last"][0] - 0.2


@pytest.mark.parametrize(
    ("calls", "stage", "again"),
    [(2, 0, [2, 3, 1, 2, 3]), (5, 1, [2, 3])],
    ids=["first stage", "second stage"],
)
def test_an_interrupted_training_resumes_to_the_same_weights(
    blocks, tokenizer, tmp_path, monkeypatch, calls, stage, again
):
    settings = TRAINING | {"batch_tokens": 2 * CONTEXT, "save_every": 1}

    def train(folder):
        train_model(SHAPES["opt"], settings, blocks, tokenizer, folder / "checkpoints", folder / "out", 1)
        return load_file(folder / "out" / "model.safetensors"), read_json(folder / "out" / "training.json")

    data = np.load(blocks)[:12]
    blocks = tmp_path / "train.npy"
    np.save(blocks, data)
    whole, record = train(tmp_path / "whole")
    steps, step = [], Trainer.training_step

    def killed(self, *args, **kwargs):
        steps.append(self.state.global_step + 1)
        if len(steps) == calls:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed")
    half = tmp_path / "killed" / "checkpoints" / f"stage-{stage}" / "checkpoint-2"
    shutil.copytree(half.with_name("checkpoint-1"), half)
    (half / "trainer_state.json").unlink()
    outcomes, train_again = [], Trainer.train
    monkeypatch.setattr(
        Trainer, "train", lambda self, **other: outcomes.append(train_again(self, **other)) or outcomes[-1]
    )
    steps.clear()
    calls = None
    weights, resumed = train(tmp_path / "killed")
    for name, weight in whole.items():
        assert torch.equal(weight, weights[name])
    assert steps == again
    assert resumed["resumed"]
    assert resumed["loss_curve"] == record["loss_curve"]
    assert resumed["tokens_seen"] == record["tokens_seen"]
    share = len(again) / 6  # the other steps took no time of this run
    per_second = share * record["tokens_seen"] / sum(o.metrics["train_runtime"] for o in outcomes)
    assert resumed["tokens_per_second"] == pytest.approx(per_second, abs=0.06)


def test_the_run_on_a_gpu_in_small(corpus, tmp_path, capsys):
    gpu_pretrain.main(["--micro", "--corpus", str(corpus), "--out", str(tmp_path), "--threads", "1"])
    printed = capsys.readouterr().out
    for name, family in (("llama-code", "llama"), ("opt-code", "opt")):
        assert models.load(tmp_path / name).config.model_type == family
        assert (tmp_path / name / "README.md").read_text().startswith(f"# {name}\n")
        assert f"{name}: 1.0 passes, accuracy 0." in printed
    assert {path.name for path in tmp_path.iterdir()} == {"llama-code", "opt-code"}
