"""Thresholds from validation: for equal depth, and for what is promised."""

from dataclasses import asdict

from greencode import job
from greencode.calibrate import calibrate
from greencode.episodes import Episodes
from greencode.files import write_json
from greencode.results import Provenance
from greencode.rules import load_rules, operating_points


def main(smk):
    wanted = smk.params.calibration
    training, validation = Episodes.load(smk.input.train), Episodes.load(smk.input.validation)
    rules = load_rules(smk.params.rules, smk.input.policies, validation, smk.params.seed)
    targets = [(name, target) for name in ("saving", "agreement") for target in wanted[name]]
    promised = [
        {"rule": rule.name} | asdict(one)
        for rule in rules
        for one in calibrate(rule, training, validation, targets, wanted["confidence"])
    ]
    settings = {"rules": dict(smk.params.rules), "shares": list(smk.params.shares), "calibration": wanted}
    write_json(
        smk.output[0],
        {
            "points": operating_points(rules, validation, smk.params.shares),
            "calibrated": promised,
            "exit_points": list(validation.exit_points),
            "provenance": asdict(Provenance.now(settings, seed=smk.params.seed)),
        },
    )


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
