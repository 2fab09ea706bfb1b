"""What an exit rule promises, from validation files."""

from dataclasses import replace
from pathlib import Path

from greencode import job
from greencode.calibrate import calibrate
from greencode.episodes import Episodes
from greencode.files import sha256
from greencode.policies import ExitPolicy
from greencode.promises import WANTED, Calibration
from greencode.results import Provenance
from greencode.rules import Rule


def main(smk):
    block, path = smk.params.calibration, smk.input.get("policy")
    training, validation = Episodes.load(smk.input.train), Episodes.load(smk.input.validation)
    rule = Rule(smk.wildcards.exit_rule, block["kind"], None, block["seed"], block["temperature"])
    if path:
        of = (validation.fingerprint, validation.exit_points, validation.observation)
        rule = replace(rule, network=ExitPolicy.load(path, *of))
    texts = None
    if block["rougeL"]:
        import torch

        from greencode.rollouts import Rollouts

        torch.set_num_threads(smk.threads)
        weights = Path(smk.input.weights).parent
        texts = Rollouts.of_split(rule, validation, weights, smk.input.texts, block["device"])
    targets = [(wanted, target) for wanted in WANTED for target in block[wanted]]
    promises = calibrate(rule, training, validation, targets, block["confidence"], texts)
    Calibration(
        rule.name,
        validation.fingerprint,
        sha256(path) if path else None,
        block["temperature"],
        tuple(promises),
    ).save(smk.output[0], Provenance.now(dict(block), seed=block["seed"]))


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
