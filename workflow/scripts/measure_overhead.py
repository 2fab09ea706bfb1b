"""The agent's overhead by difference: asked at every exit point and never leaving, against not asked."""

from dataclasses import asdict
from pathlib import Path

from greencode import generate, job
from greencode.energy import Meter
from greencode.engine import OBSERVATION
from greencode.files import write_json
from greencode.models import fingerprint, pick_device
from greencode.policies import AgentExit, ExitPolicy


def main(smk):
    block, names = smk.params.generate, smk.wildcards
    directory = Path(smk.input.weights).parent
    chosen = dict(block) | {"samples": block["overhead"]["samples"]}
    engine, samples, device = generate.ready(chosen, directory, smk.input.test)
    agent = ExitPolicy.load(smk.input.policy, fingerprint(directory), engine.exit_points, OBSERVATION)
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
