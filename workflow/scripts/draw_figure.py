"""One figure of several methods, pairs or curves; the rule names the function of greencode.figures."""

from greencode import figures, job
from greencode.files import read_json
from greencode.results import Evaluation
from greencode.tables import read_published


def data_of(smk):
    """The arguments before style and stem that the rule's figure takes."""
    kind = smk.params.data
    if kind == "evaluations":
        return [[Evaluation.read(path) for path in smk.input.evaluations]]
    if kind == "published":
        evaluations = [Evaluation.read(path) for path in smk.input.evaluations]
        return [evaluations, read_published(smk.input.published)]
    if kind == "curves":
        pairs = map(tuple, smk.params.pairs)
        return [dict(zip(pairs, map(read_json, smk.input.curves), strict=True))]
    if kind == "learning":
        return [[read_json(path) for path in smk.input.learning]]
    if kind == "frontiers":
        return [[read_json(path) for path in smk.input]]
    return [smk.params.models]


def main(smk):
    draw = getattr(figures, smk.params.function)
    draw(*data_of(smk), smk.params.style, smk.output.pdf.removesuffix(".pdf"))


if __name__ == "__main__":
    job.run(main, snakemake)  # noqa: F821
