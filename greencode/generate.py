"""Measured completions of the test split by one method (paper, section VI-C), and the agent's overhead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from greencode.corpus import read_split
from greencode.energy import Meter
from greencode.engine import Completion as Decoded
from greencode.engine import Engine, Policy
from greencode.errors import UserError
from greencode.models import load, pick_device
from greencode.progress import progress
from greencode.results import Completion, Generation, Provenance, device_name
from greencode.tokenise import Sample, cut, encode, load_tokenizer


def choose_samples(
    files: Sequence[Sequence[int]], ids: Sequence[int], settings: dict[str, Any], seed: int
) -> list[Sample]:
    """`settings["samples"]` test files, chosen by seed among those that are long enough.

    Raises:
        UserError: fewer files are long enough than samples are asked for.
    """
    cuts = (
        cut(
            file_id, tokens, settings["context"], settings["max_context"], settings["new_tokens"],
            settings["min_context"],
        )
        for file_id, tokens in zip(ids, files, strict=True)
    )  # fmt: skip
    usable = [sample for sample in cuts if sample is not None]
    wanted = settings["samples"]
    if len(usable) < wanted:
        raise UserError(
            f"Only {len(usable)} of {len(files)} test files are long enough for a context of "
            f"{settings['min_context']} tokens at {settings['context']:.0%} of the file, and {wanted} "
            "samples are asked for; lower generate.samples or use more files."
        )
    order = np.random.default_rng(seed).permutation(len(usable))[:wanted]
    return [usable[index] for index in sorted(order)]


def ready(
    settings: dict[str, Any], directory: str | Path, test: str | Path
) -> tuple[Engine, list[Sample], str]:
    """The engine of a model directory, the samples of a test split, and the device, as settings ask for.

    Torch's number of threads is set.
    """
    torch.set_num_threads(settings["threads"])
    device = pick_device(settings["device"])
    tokenizer = load_tokenizer(directory)
    model = load(directory, device, getattr(torch, settings["dtype"]))
    records = read_split(test)
    files = list(encode(tokenizer, (record.code for record in records)))
    samples = choose_samples(files, [record.id for record in records], settings, settings["seed"])
    return Engine(model, settings["exit_points"], tokenizer), samples, device


def run(
    engine: Engine,
    samples: Sequence[Sample],
    policy: Policy | None,
    settings: dict[str, Any],
    meter: Meter,
    kv: str,
    about: dict[str, Any],
    provenance: Provenance,
) -> Generation:
    """Complete every sample greedily, one at a time, inside one window of the meter.

    The first `settings["warmup"]` samples run once before anything is timed.

    Args:
        about: `model`, `dataset`, `language`, `method`, `threshold` of the `Generation`.
    """
    decoding = Decoding(kv, lambda number: policy)
    _warm_up(engine, samples, [decoding], settings, meter)
    shown = progress(samples, about["method"])
    completions = _timed(engine, shown, decoding, settings["new_tokens"], meter)
    return _generation(engine, meter, completions, about, provenance)


@dataclass(frozen=True)
class Decoding:
    """How a method makes its completions.

    Attributes:
        kv: mode of the KV cache.
        policy_of: exit policy of a sample, by its number.
        threshold: T of the policy, if it has one.
        drafts: where they are verified, how many may wait.
    """

    kv: str
    policy_of: Callable[[int], Policy | None]
    threshold: float | None = None
    drafts: int = 1


def run_side_by_side(
    engine: Engine,
    samples: Sequence[Sample],
    methods: dict[str, Decoding],
    settings: dict[str, Any],
    meter: Meter,
    about: dict[str, Any],
    provenance: Provenance,
    seed: int = 0,
) -> dict[str, Generation]:
    """`run` for several methods at once, so that whatever the machine does meanwhile is shared by all.

    Block by block of samples, each method completes the block in one window of the meter; the order of the
    methods is drawn anew for every block. A block is one sample, so that methods meet as much of the same
    as can be, or ten where the meter reads a counter, which needs windows of a second.

    Args:
        about: `model`, `dataset`, `language` of the `Generation`s.
    """
    block = 10 if meter.counts else 1
    _warm_up(engine, samples, list(methods.values()), settings, meter)
    done: dict[str, list[Completion]] = {name: [] for name in methods}
    rng = np.random.default_rng(seed)
    for start in progress(range(0, len(samples), block), "side by side"):
        for index in rng.permutation(len(methods)):
            name = list(methods)[index]
            done[name] += _timed(
                engine, samples[start : start + block], methods[name], settings["new_tokens"], meter, start
            )
    return {
        name: _generation(
            engine,
            meter,
            done[name],
            about | {"method": name, "threshold": decoding.threshold},
            replace(provenance, kv=decoding.kv),
        )
        for name, decoding in methods.items()
    }


def _warm_up(engine, samples, decodings: Sequence[Decoding], settings: dict[str, Any], meter: Meter) -> None:
    # Caches and memory are those of a KV mode, whatever decides on leaving.
    for decoding in {decoding.kv: decoding for decoding in decodings}.values():
        for number, sample in enumerate(samples[: settings["warmup"]]):
            _complete(engine, sample, decoding, number, settings["new_tokens"])
    meter.measure_idle(settings["idle_seconds"])


def _complete(engine: Engine, sample: Sample, decoding: Decoding, number: int, new_tokens: int) -> Decoded:
    return engine.complete(
        sample.context, new_tokens, decoding.policy_of(number), kv=decoding.kv, drafts=decoding.drafts
    )


def _timed(
    engine: Engine,
    samples: Iterable[Sample],
    decoding: Decoding,
    new_tokens: int,
    meter: Meter,
    first: int = 0,
) -> list[Completion]:
    """Complete samples one at a time inside one window of the meter; `first` is the first one's number."""
    timed = []
    with meter.window() as window:
        for number, sample in enumerate(samples, first):
            wall, cpu = time.perf_counter(), time.process_time()
            done = _complete(engine, sample, decoding, number, new_tokens)
            timed.append((sample, done, time.perf_counter() - wall, time.process_time() - cpu))
    joules = meter.share(window.energy, [seconds for *_, seconds, _ in timed])
    return [
        Completion(
            id=sample.id,
            context_tokens=len(sample.context),
            tokens=done.tokens,
            reference=sample.reference,
            text=done.text,
            reference_text=engine.tokenizer.decode(sample.reference),
            depths=done.depths,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            joules=share,
            layer_positions=done.usage.layer_positions,
            checks=done.usage.checks,
            drafts=done.usage.drafts,
            accepted=done.usage.accepted,
        )
        for (sample, done, seconds, cpu_seconds), share in zip(timed, joules, strict=True)
    ]


def _generation(
    engine: Engine, meter: Meter, completions: list[Completion], about: dict[str, Any], provenance: Provenance
) -> Generation:
    return Generation(
        layers=engine.family.depth,
        exit_points=list(engine.exit_points),
        energy_source=meter.source,
        energy_note=meter.note,
        provenance=provenance,
        completions=completions,
        **about,
    )


def measure_overhead(
    engine: Engine,
    samples: Sequence[Sample],
    never_leaving: Policy,
    new_tokens: int,
    repeats: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Cost of one check of the agent, by difference (Table IV; findings on its measurement in docs/).

    Each sample is completed at full depth with and without the agent asked at every exit point, in turn
    and in changing order. CPU time of the process; for each sample the median over repeats; then the mean
    difference over samples, per check, with a 95 % bootstrap interval.
    """

    def seconds(policy: Policy | None) -> Callable[[Sample], tuple[float, int]]:
        def timed(sample: Sample) -> tuple[float, int]:
            start = time.process_time()
            done = engine.complete(sample.context, new_tokens, policy)
            return time.process_time() - start, done.usage.checks

        return timed

    plain, checking = seconds(None), seconds(never_leaving)
    full, asked, checks = [], [], 0
    for sample in progress(samples, "overhead"):
        pairs = []
        for repeat in range(repeats + 1):
            if repeat % 2:
                (b, checks), (a, _) = checking(sample), plain(sample)
            else:
                (a, _), (b, checks) = plain(sample), checking(sample)
            pairs.append((a, b))
        full.append(statistics.median(a for a, _ in pairs[1:]))  # the first warms up
        asked.append(statistics.median(b for _, b in pairs[1:]))
    per_check = (np.array(asked) - np.array(full)) / checks
    rng = np.random.default_rng(seed)
    means = per_check[rng.integers(len(per_check), size=(resamples, len(per_check)))].mean(axis=1)
    return {
        "full_cpu_seconds": float(np.mean(full)),
        "checking_cpu_seconds": float(np.mean(asked)),
        "checks": checks,
        "seconds_per_check": float(per_check.mean()),
        "seconds_per_check_low": float(np.quantile(means, 0.025)),
        "seconds_per_check_high": float(np.quantile(means, 0.975)),
        "repeats": repeats,
        "samples": len(samples),
    }


def provenance_of(engine: Engine, settings: dict[str, Any], kv: str, seed: int, threads: int) -> Provenance:
    """Provenance of a run of this engine that begins now."""
    return Provenance.now(
        settings,
        device=device_name(str(engine.family.device)),
        dtype=str(engine.family.dtype).removeprefix("torch."),
        kv=kv,
        threads=threads,
        seed=seed,
    )
