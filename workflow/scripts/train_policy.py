"""A rival exit rule, trained by supervision on recorded trajectories."""

from greencode import job
from greencode.episodes import Episodes
from greencode.stopping import Settings, train


def main(smk):
    block = smk.params.policy
    settings = Settings(epochs=block["epochs"], learning_rate=block["learning_rate"], seed=block["seed"],
                        threads=smk.threads, hidden=block["hidden"], price=block["price"])  # fmt: skip
    if block["kind"] == "classifier":
        settings = settings.linear()
    train(Episodes.load(smk.input.train), settings).save(smk.output[0])


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
