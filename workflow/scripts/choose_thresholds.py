"""Thresholds of every rule for equal depth, from validation episodes."""

from dataclasses import asdict

from greencode import job
from greencode.episodes import Episodes
from greencode.files import write_json
from greencode.results import Provenance
from greencode.rules import load_rules, operating_points, verified_points


def main(smk):
    block = smk.params.frontier
    validation = Episodes.load(smk.input.validation)
    rules = load_rules(smk.params.rules, smk.input.policies, validation, block["seed"], block["temperature"])
    settings = {"rules": dict(smk.params.rules)} | {name: block[name] for name in ("shares", "verified")}
    points = operating_points(rules, validation, block["shares"])
    write_json(
        smk.output[0],
        {
            "points": points + verified_points(rules, validation, block["verified"]),
            "exit_points": list(validation.exit_points),
            "provenance": asdict(Provenance.now(settings, seed=block["seed"])),
        },
    )


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
