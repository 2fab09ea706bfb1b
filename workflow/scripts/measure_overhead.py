"""The agent's overhead by difference: asked at every exit point and never leaving, against not asked."""

from dataclasses import asdict
from pathlib import Path

from greencode import generate, job
from greencode.corpus import read_split
from greencode.energy import Meter
from greencode.engine import OBSERVATION, Engine
from greencode.files import write_json
from greencode.models import fingerprint, load, pick_device
from greencode.policies import AgentExit, ExitPolicy
from greencode.tokenise import encode, load_tokenizer


def main(smk):
    import torch

    block, names = smk.params.generate, smk.wildcards
    torch.set_num_threads(block["threads"])
    device = pick_device(block["device"])
    directory = Path(smk.input.weights).parent
    tokenizer = load_tokenizer(directory)
    engine = Engine(load(directory, device, getattr(torch, block["dtype"])), block["exit_points"])
    agent = ExitPolicy.load(smk.input.policy, fingerprint(directory), engine.exit_points, OBSERVATION)
    records = read_split(smk.input.test)
    files = list(encode(tokenizer, (record.code for record in records)))
    chosen = dict(block) | {"samples": block["overhead"]["samples"]}
    samples = generate.choose_samples(files, [record.id for record in records], chosen, block["seed"])
    provenance = generate.provenance_of(engine, chosen, "deferred", block["seed"], block["threads"])
    cost = generate.measure_overhead(
        engine,
        samples,
        AgentExit(agent, 1.0, block["temperature"], device),
        block["new_tokens"],
        block["overhead"]["repeats"],
        1000,
        block["seed"],
    )
    about = {"model": names.model, "dataset": names.dataset, "agent": names.agent}
    write_json(smk.output[0], about | cost | {"provenance": asdict(provenance)})


if __name__ == "__main__":
    meter = Meter.open(pick_device(snakemake.params.generate["device"]))  # noqa: F821
    job.run(main, snakemake, meter=meter)  # noqa: F821
