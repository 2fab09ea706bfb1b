"""Measured completions of the test split by one method.

One script for base, full, fixed exits and agents: the rules differ in the weights they name and in the
policy, which `depth` or `agent` and `threshold` among the params decide.
"""

from pathlib import Path

from greencode import generate, job
from greencode.energy import Meter
from greencode.engine import OBSERVATION
from greencode.models import fingerprint, pick_device
from greencode.policies import AgentExit, ExitPolicy, FixedExit


def policy_of(smk, engine, directory, device):
    """The exit policy that the rule's params ask for; None for a full-depth method."""
    if hasattr(smk.params, "depth"):
        return FixedExit(int(smk.params.depth))
    if hasattr(smk.params, "threshold"):
        agent = ExitPolicy.load(smk.input.policy, fingerprint(directory), engine.exit_points, OBSERVATION)
        return AgentExit(agent, float(smk.params.threshold), smk.params.generate["temperature"], device)
    return None


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
    }
    provenance = generate.provenance_of(engine, dict(block), kv, block["seed"], block["threads"])
    meter = Meter.open(device, block["cpu_watts"] or None)
    generate.run(engine, samples, policy, block, meter, kv, about, provenance).write(smk.output[0])


if __name__ == "__main__":
    meter = Meter.open(pick_device(snakemake.params.generate["device"]))  # noqa: F821
    job.run(main, snakemake, meter=meter)  # noqa: F821
