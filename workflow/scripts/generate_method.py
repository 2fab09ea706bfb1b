"""Measured completions of the test split by one method.

One script for base, full, fixed exits and agents: the rules differ in the weights they name and in the
policy, which `depth`, `threshold`, or `wanted` and `target` among the params decide.
"""

import sys
from pathlib import Path

from greencode import generate, job
from greencode.energy import Meter
from greencode.engine import OBSERVATION
from greencode.models import fingerprint, pick_device
from greencode.policies import AgentExit, ExitPolicy, FixedExit
from greencode.promises import Calibration


def policy_of(smk, engine, directory, device):
    """The exit policy that the rule's params ask for; None for a full-depth method."""
    if hasattr(smk.params, "depth"):
        return FixedExit(int(smk.params.depth))
    if hasattr(smk.params, "threshold"):
        threshold = float(smk.params.threshold)
    elif hasattr(smk.params, "target"):
        threshold = promised(Calibration.load(smk.input.calibration), smk.params.wanted, smk.params.target)
    else:
        return None
    agent = ExitPolicy.load(smk.input.policy, fingerprint(directory), engine.exit_points, OBSERVATION)
    return AgentExit(agent, threshold, smk.params.generate["temperature"], device)


def promised(calibration, wanted, target):
    """The threshold that keeps a promise; what cannot be promised is not tried, and no token leaves early."""
    promise = calibration.find(wanted, float(target))
    if promise is None:
        print(f"{wanted} {target} cannot be promised: every token runs at full depth.", file=sys.stderr)
    return promise.threshold if promise else 1.0


def main(smk):
    block, names = smk.params.generate, smk.wildcards
    directory = Path(smk.input.weights).parent
    engine, samples, device = generate.ready(block, directory, smk.input.test)
    policy = policy_of(smk, engine, directory, device)
    # A full-depth method runs with the plain cache, unless the study follows the uncached protocol.
    kv = "full" if policy is None and block["kv"] != "none" else block["kv"]
    about = {
        "model": names.model,
        "dataset": names.dataset,
        "language": block["language"],
        "method": Path(smk.output[0]).name.removesuffix(".jsonl"),
        "threshold": getattr(policy, "threshold", None),
    }
    provenance = generate.provenance_of(engine, dict(block), kv, block["seed"], block["threads"])
    meter = Meter.open(device, block["cpu_watts"] or None)
    generate.run(engine, samples, policy, block, meter, kv, about, provenance).write(smk.output[0])


if __name__ == "__main__":
    meter = Meter.open(pick_device(snakemake.params.generate["device"]))  # noqa: F821
    job.run(main, snakemake, meter=meter)  # noqa: F821
