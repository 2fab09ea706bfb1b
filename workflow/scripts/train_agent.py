"""PPO on recorded trajectories; the exported policy and how it learned."""

import shutil
from dataclasses import asdict
from pathlib import Path

from greencode import job
from greencode.agent import Settings, train, validation_table
from greencode.episodes import Episodes
from greencode.files import sha256, write_json
from greencode.results import Provenance, config_hash
from greencode.reward import Reward


def main(smk):
    block, names = smk.params.agent, smk.wildcards
    overrides = {key: block[key] for key in ("steps", "environments", "normalise", "entropy")}
    if block["learning_rate"]:
        overrides["learning_rate"] = block["learning_rate"]
    settings = Settings.preset(block["preset"], seed=block["seed"], threads=smk.threads, **overrides)
    episodes, validation = Episodes.load(smk.input.train), Episodes.load(smk.input.validation)
    checkpoints = Path(smk.output.policy).parent / "checkpoints"
    key = config_hash([block, smk.params.code, sha256(smk.input.train)])
    provenance = Provenance.now(block, seed=block["seed"], threads=smk.threads)
    trained = train(episodes, validation, Reward(**block["reward"]), settings, checkpoints / key)
    trained.policy.save(smk.output.policy)
    rows = validation_table(validation, trained.policy, [t / 100 for t in range(5, 100, 5)])
    write_json(
        smk.output.curve,
        trained.record()
        | {"model": names.model, "dataset": names.dataset, "agent": names.agent}
        | {"exit_points": list(episodes.exit_points), "settings": asdict(settings)}
        | {
            "steps": settings.steps,
            "reward": block["reward"],
            "validation": [row._asdict() for row in rows],
            "provenance": asdict(provenance),
        },
    )
    shutil.rmtree(checkpoints, ignore_errors=True)  # a short training makes none


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
