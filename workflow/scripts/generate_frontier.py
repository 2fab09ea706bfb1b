"""Measured completions of the same samples by every exit rule at every threshold, side by side."""

from pathlib import Path

import numpy as np

from greencode import generate, job
from greencode.corpus import read_split
from greencode.energy import Meter
from greencode.engine import OBSERVATION, Engine
from greencode.episodes import Episodes
from greencode.files import read_json
from greencode.generate import Method
from greencode.models import fingerprint, load, pick_device
from greencode.policies import FixedExit, ScriptedExit
from greencode.results import write_generations
from greencode.rules import load_rules
from greencode.tokenise import encode, load_tokenizer


def episodes_of(engine, samples, new_tokens, directory, batch=16):
    """What every exit point answers along the full model's text from each sample's context."""
    parts = [
        engine.trace([sample.context for sample in samples[start : start + batch]], new_tokens)
        for start in range(0, len(samples), batch)
    ]
    observations, tokens, signals = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Episodes(
        observations, tokens, signals, engine.exit_points, OBSERVATION, fingerprint(directory),
        np.array([sample.id for sample in samples]), np.array([len(sample.context) for sample in samples]),
    )  # fmt: skip


def methods_of(engine, episodes, rules, points, kv, device):
    """Full depth, fixed exits, the oracle, and every rule at its thresholds."""
    exits = engine.exit_points
    methods = {"full": Method(kv="full" if kv != "none" else kv)}
    methods |= {f"fixed-{depth}": Method(FixedExit(depth), kv) for depth in exits[:-1]}
    best = np.array(exits)[episodes.optimal_exits()]
    methods["oracle"] = Method(kv=kv, for_sample=lambda number: ScriptedExit(best[number], exits))
    by_name = {rule.name: rule for rule in rules}
    for point in points:
        rule = by_name[point["rule"]]
        methods[point["method"]] = Method(rule.policy(point["threshold"], exits, device), kv)
    return methods


def main(smk):
    import torch

    block, names = smk.params.generate, smk.wildcards
    torch.set_num_threads(block["threads"])
    device = pick_device(block["device"])
    directory = Path(smk.input.weights).parent
    tokenizer = load_tokenizer(directory)
    engine = Engine(load(directory, device, getattr(torch, block["dtype"])), block["exit_points"], tokenizer)
    records = read_split(smk.input.test)
    files = list(encode(tokenizer, (record.code for record in records)))
    samples = generate.choose_samples(files, [record.id for record in records], block, block["seed"])
    episodes = episodes_of(engine, samples, block["new_tokens"], directory)
    rules = load_rules(smk.params.rules, smk.input.policies, episodes, block["seed"])
    points = read_json(smk.input.thresholds)["points"]
    methods = methods_of(engine, episodes, rules, points, block["kv"], device)
    about = {"model": names.model, "dataset": names.dataset, "language": block["language"]}
    provenance = generate.provenance_of(engine, dict(block), block["kv"], block["seed"], block["threads"])
    meter = Meter.open(device, block["cpu_watts"] or None)
    done = generate.run_side_by_side(
        engine, samples, methods, block, meter, about, provenance, seed=block["seed"]
    )
    episodes.save(smk.output.episodes)
    write_generations(done.values(), smk.output.generations)


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
