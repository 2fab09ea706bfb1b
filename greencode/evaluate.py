"""From completions to numbers: quality and cost of one method, each with its 95 % interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace

from greencode import metrics as scoring
from greencode.errors import UserError
from greencode.results import Completion, Evaluation, Generation, Interval, Provenance


def evaluate(
    generation: Generation, seed: int = 0, resamples: int = 1000, metrics: Sequence[str] | None = None
) -> Evaluation:
    """Score all completions of one method.

    Args:
        generation: the completions, with their references, depths, seconds and joules.
        seed, resamples: of the bootstrap over samples; the same seed and sample count draw the same
            resamples, whatever the method.
        metrics: names from `greencode.metrics.QUALITY`; all if None.

    Raises:
        UserError: no completions, or an unknown metric or language.
    """
    samples = generation.completions
    if not samples:
        raise UserError(
            f"The generations of {generation.method} on {generation.dataset} hold no completions; "
            "raise the number of samples or check the test data."
        )
    settings = {
        "seed": seed,
        "resamples": resamples,
        "metrics": list(scoring.QUALITY if metrics is None else metrics),
        "generation": generation.provenance.config_hash,
    }
    made = generation.provenance
    # Hashed with the generation's hash, not with its time stamp: the same settings keep the same hash.
    provenance = Provenance.now(
        settings, device=made.device, dtype=made.dtype, kv=made.kv, threads=made.threads, seed=made.seed
    )
    provenance = replace(provenance, settings=settings | {"generation": asdict(made)})
    return Evaluation(
        model=generation.model,
        dataset=generation.dataset,
        language=generation.language,
        method=generation.method,
        layers=generation.layers,
        exit_points=generation.exit_points,
        samples=len(samples),
        quality=scoring.quality(
            [sample.text for sample in samples],
            [sample.reference_text for sample in samples],
            generation.language,
            [sample.tokens for sample in samples],
            [sample.reference for sample in samples],
            metrics=metrics,
            seed=seed,
            resamples=resamples,
        ),
        cost=cost(samples, generation.layers, seed, resamples),
        depth_counts=dict(sorted(Counter(depth for sample in samples for depth in sample.depths).items())),
        energy_source=generation.energy_source,
        energy_note=generation.energy_note,
        provenance=provenance,
        threshold=generation.threshold,
    )


def cost(
    samples: Sequence[Completion], layers: int, seed: int = 0, resamples: int = 1000
) -> dict[str, Interval]:
    """What completions cost, each figure with its 95 % interval over samples.

    Returns:
        Means per sample: `seconds`, `cpu_seconds`, `joules`, `layer_positions`, `checks`. Per generated
        token: `layers` (mean depth), `layers_skipped` (N - mean depth), `joules_per_token`; and
        `tokens_per_second`; and `drafts_accepted`, a share of the verified drafts. These are sums over sums,
        not means of ratios. Joules are left out unless every sample has them; so is a ratio whose denominator
        is 0.
    """
    seconds = [sample.seconds for sample in samples]
    tokens = [len(sample.tokens) for sample in samples]
    # One depth per token; counted apart so that a mean depth stays one whatever a record holds.
    decided = [len(sample.depths) for sample in samples]
    depths = [sum(sample.depths) for sample in samples]
    found = {
        "seconds": scoring.mean(seconds),
        "cpu_seconds": scoring.mean([sample.cpu_seconds for sample in samples]),
        "tokens_per_second": scoring.ratio(tokens, seconds),
        "layers": scoring.ratio(depths, decided),
        "layers_skipped": scoring.ratio(
            [layers * n - depth for n, depth in zip(decided, depths, strict=True)], decided
        ),
        "layer_positions": scoring.mean([sample.layer_positions for sample in samples]),
        "checks": scoring.mean([sample.checks for sample in samples]),
        "drafts_accepted": scoring.ratio(
            [sample.accepted for sample in samples], [sample.drafts for sample in samples]
        ),
    }
    joules = [sample.joules for sample in samples if sample.joules is not None]
    if len(joules) == len(samples):
        found["joules"] = scoring.mean(joules)
        found["joules_per_token"] = scoring.ratio(joules, tokens)
    return scoring.intervals(found, seed, resamples)


def paired_difference(
    a: Sequence[float], b: Sequence[float], seed: int = 0, resamples: int = 1000
) -> Interval:
    """Mean of a - b with its 95 % interval, for two methods on the same samples in the same order.

    Narrower than the difference of two intervals, since what makes a sample hard cancels out.

    Raises:
        UserError: the two have different numbers of samples, or none.
    """
    if len(a) != len(b):
        raise UserError(
            f"Methods with {len(a)} and {len(b)} samples cannot be compared in pairs; "
            "generate both on the same samples."
        )
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return scoring.intervals({"difference": scoring.mean(differences)}, seed, resamples)["difference"]
