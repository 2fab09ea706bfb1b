"""What a request chooses by its body, its headers and the server's defaults: how tokens leave, sampling."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from greencode.parameters import COLDEST, ExitPolicyName, ExitTarget, Parameters, refused
from greencode.promises import Calibration


@dataclass(frozen=True)
class Exit:
    """How tokens leave: a policy, with the threshold of `rl` or the depth of `fixed`; the target that the
    threshold keeps, if one was asked for; whether the final layer verifies what has left."""

    policy: ExitPolicyName
    threshold: float | None = None
    layer: int | None = None
    target: ExitTarget | None = None
    verify: bool = False


@dataclass(frozen=True)
class HeaderExit:
    """The exit that a request's headers ask for."""

    exit_threshold: float | None = None
    exit_target: ExitTarget | None = None
    exit_policy: ExitPolicyName | None = None
    exit_verify: bool | None = None


@dataclass(frozen=True)
class Exits:
    """The exits that a server has.

    Attributes:
        points: depths, ending at N.
        agent: whether there is one.
        default: where a request asks for nothing; its threshold holds for `rl` wherever none is given.
        calibration: what the agent promises.
    """

    points: tuple[int, ...]
    agent: bool
    default: Exit
    calibration: Calibration | None = None


def choose_exit(request: Parameters, header: HeaderExit, exits: Exits) -> Exit:
    """The exit that a request asks for; its body goes before the headers, and these before the default.

    A threshold or a target without a policy asks for the agent, a depth for a fixed exit.

    Raises:
        ServiceError: 422, contradictory, or nothing that this server has.
    """
    layer = request.exit_layer
    for one in (request, header):
        if one.exit_threshold is not None and one.exit_target is not None:
            raise refused("exit_target", "exit_threshold and exit_target exclude each other")
    for_agent, header_for_agent = (
        one.exit_threshold is not None or one.exit_target is not None for one in (request, header)
    )
    if request.exit_policy is None and layer is not None and for_agent:
        raise refused("exit_policy", "exit_threshold or exit_target, and exit_layer exclude each other")
    implied = "fixed" if layer is not None else "rl" if for_agent else None
    header_implied = "rl" if header_for_agent else None
    policy = request.exit_policy or implied or header.exit_policy or header_implied or exits.default.policy
    if policy != "fixed" and layer is not None:
        raise refused("exit_layer", "it needs exit_policy fixed")
    if policy == "none":
        return Exit("none")  # with nothing to verify
    asked = (request.exit_verify, header.exit_verify, exits.default.verify)
    verify = next(one for one in asked if one is not None)
    if policy == "rl":
        if not exits.agent:
            raise refused("exit_policy", "this server has no agent; use fixed or none")
        return replace(_agents_exit(request, header, exits), verify=verify)
    if layer is None:
        raise refused("exit_layer", "exit_policy fixed needs it")
    if layer not in exits.points:
        raise refused("exit_layer", f"it must be one of the exit points {list(exits.points)}")
    return Exit("fixed", layer=layer, verify=verify)


def _agents_exit(request: Parameters, header: HeaderExit, exits: Exits) -> Exit:
    for one in (request, header):
        if one.exit_threshold is not None:
            return Exit("rl", one.exit_threshold)
        if one.exit_target is not None:
            try:
                return Exit("rl", one.exit_target.promised(exits.calibration), target=one.exit_target)
            except LookupError as error:
                raise refused("exit_target", str(error)) from None
    return Exit("rl", exits.default.threshold, target=exits.default.target)


def choose_sampling(request: Parameters) -> dict[str, Any] | None:
    """Arguments of `greencode.engine.Sampling`, with a seed if there is chance in it; None is plain greedy.

    Greedy unless asked to sample, or a temperature other than 0 and 1, a top_p or a top_k is given.
    """
    heat = request.temperature
    asked = heat not in (None, 0, 1) or request.top_p not in (None, 1) or bool(request.top_k)
    sample = asked if request.do_sample is None else request.do_sample
    penalty = request.repetition_penalty or 1.0
    if not sample or (heat is not None and heat < COLDEST):
        return None if penalty == 1 else {"repetition_penalty": penalty}
    return {
        "temperature": 1.0 if heat is None else heat,
        "top_k": request.top_k or None,
        "top_p": request.top_p,
        "repetition_penalty": penalty,
        "seed": secrets.randbelow(2**31) if request.seed is None else request.seed,
    }
