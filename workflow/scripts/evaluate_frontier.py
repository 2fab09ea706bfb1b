"""Every exit rule scored: its points, its savings, and against the others."""

from dataclasses import asdict
from pathlib import Path

from greencode import frontier, job
from greencode.episodes import Episodes
from greencode.files import read_json, write_json
from greencode.policies import ExitPolicy
from greencode.promises import Calibration
from greencode.results import Provenance, read_generations
from greencode.rules import load_rules


def main(smk):
    block = smk.params.evaluate
    chosen = read_json(smk.input.thresholds)
    generations = {one.method: one for one in read_generations(smk.input.generations)}
    episodes = Episodes.load(smk.input.episodes)
    rules = load_rules(smk.params.rules, smk.input.policies, episodes, block["seed"], block["temperature"])
    promises = {one.rule: one.promises for one in map(Calibration.load, smk.input.calibrations)}
    validation = Episodes.load(smk.input.validation)
    others: dict[str, list[ExitPolicy]] = {}
    for path in map(Path, smk.input.seeds):
        policy = ExitPolicy.load(path, episodes.fingerprint, episodes.exit_points, episodes.observation)
        others.setdefault(path.parent.parent.name, []).append(policy)
    settings = {**block, "thresholds": chosen["provenance"]["config_hash"]}
    write_json(
        smk.output[0],
        frontier.record(
            generations, episodes, rules, chosen["points"], promises, block["seed"], block["resamples"]
        )
        | {"seeds": frontier.seeds(rules, others, validation, episodes, chosen["points"])}
        | {"provenance": asdict(Provenance.now(settings, seed=block["seed"]))},
    )


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
