"""Measured completions of the test split by one method.

One script for base, full, fixed exits and agents: the rules differ in the weights they name and in the
policy, which `depth` or `agent` and `threshold` among the params decide.
"""

from pathlib import Path

from greencode import generate, job
from greencode.corpus import read_split
from greencode.energy import Meter
from greencode.engine import OBSERVATION, Engine
from greencode.models import fingerprint, load, pick_device
from greencode.policies import AgentExit, ExitPolicy, FixedExit
from greencode.tokenise import encode, load_tokenizer


def policy_of(smk, engine, directory, device):
    """The exit policy that the rule's params ask for; None for a full-depth method."""
    if hasattr(smk.params, "depth"):
        return FixedExit(int(smk.params.depth))
    if hasattr(smk.params, "threshold"):
        agent = ExitPolicy.load(smk.input.policy, fingerprint(directory), engine.exit_points, OBSERVATION)
        return AgentExit(agent, float(smk.params.threshold), smk.params.generate["temperature"], device)
    return None


def main(smk):
    import torch

    block, names = smk.params.generate, smk.wildcards
    torch.set_num_threads(block["threads"])
    device = pick_device(block["device"])
    directory = Path(smk.input.weights).parent
    tokenizer = load_tokenizer(directory)
    model = load(directory, device, getattr(torch, block["dtype"]))
    engine = Engine(model, block["exit_points"], tokenizer)
    records = read_split(smk.input.test)
    files = list(encode(tokenizer, (record.code for record in records)))
    samples = generate.choose_samples(files, [record.id for record in records], block, block["seed"])
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
