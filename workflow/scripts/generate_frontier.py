"""Measured completions of the same samples by every exit rule at every threshold, side by side."""

from pathlib import Path

import numpy as np

from greencode import generate, job
from greencode.energy import Meter
from greencode.engine import OBSERVATION
from greencode.episodes import Episodes
from greencode.files import read_json
from greencode.generate import Decoding
from greencode.models import fingerprint, pick_device
from greencode.policies import FixedExit, ScriptedExit
from greencode.results import write_generations
from greencode.rules import load_rules


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


def methods_of(engine, episodes, rules, points, kv, drafts, device):
    """Full depth, fixed exits, the oracle, and every rule at its thresholds."""

    def always(policy, threshold=None, kv=kv):
        return Decoding(kv, lambda number: policy, threshold, drafts)

    exits, by_name = engine.exit_points, {rule.name: rule for rule in rules}
    best = np.array(exits)[episodes.optimal_exits()]
    methods = {"full": Decoding("full" if kv != "none" else kv, lambda number: None)}
    methods |= {f"fixed-{depth}": always(FixedExit(depth)) for depth in exits[:-1]}
    methods["oracle"] = Decoding(kv, lambda number: ScriptedExit(best[number], exits))
    for point in points:
        policy = by_name[point["policy"]].policy(point["threshold"], exits, device)
        methods[point["method"]] = always(policy, point["threshold"], point["kv"] or kv)
    return methods


def main(smk):
    block, names = smk.params.generate, smk.wildcards
    directory = Path(smk.input.weights).parent
    engine, samples, device = generate.ready(block, directory, smk.input.test)
    episodes = episodes_of(engine, samples, block["new_tokens"], directory)
    rules = load_rules(smk.params.rules, smk.input.policies, episodes, block["seed"], block["temperature"])
    points = read_json(smk.input.thresholds)["points"]
    methods = methods_of(engine, episodes, rules, points, block["kv"], block["drafts"], device)
    about = {"model": names.model, "dataset": names.dataset, "language": block["language"]}
    provenance = generate.provenance_of(engine, dict(block), block["kv"], block["seed"], block["threads"])
    meter = Meter.open(device, block["cpu_watts"] or None)
    done = generate.run_side_by_side(
        engine, samples, methods, block, meter, about, provenance, seed=block["seed"]
    )
    episodes.save(smk.output.episodes)
    write_generations(done.values(), smk.output.generations)


if __name__ == "__main__":
    meter = Meter.open(pick_device(snakemake.params.generate["device"]))  # noqa: F821
    job.run(main, snakemake, meter=meter)  # noqa: F821
