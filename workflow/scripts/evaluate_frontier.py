"""Every exit rule scored: its points, its savings, and against the others."""

from dataclasses import asdict

from greencode import frontier, job
from greencode.calibrate import Calibration
from greencode.episodes import Episodes
from greencode.files import read_json, write_json
from greencode.results import Provenance, read_generations
from greencode.rules import load_rules


def main(smk):
    block = smk.params.evaluate
    chosen = read_json(smk.input.thresholds)
    generations = {one.method: one for one in read_generations(smk.input.generations)}
    episodes = Episodes.load(smk.input.episodes)
    rules = load_rules(smk.params.rules, smk.input.policies, episodes, block["seed"], block["temperature"])
    promises = {one.rule: one.promises for one in map(Calibration.load, smk.input.calibrations)}
    settings = {**block, "thresholds": chosen["provenance"]["config_hash"]}
    write_json(
        smk.output[0],
        frontier.record(
            generations, episodes, rules, chosen["points"], promises, block["seed"], block["resamples"]
        )
        | {"provenance": asdict(Provenance.now(settings, seed=block["seed"]))},
    )


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
