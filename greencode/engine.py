"""Early-exit decoding, layer by layer, with a KV cache that stays exact.

A token may leave at an exit point, so later tokens find layers whose keys and values for it are missing.
Five ways to deal with that (`kv`):

- `deferred` (default): a token that leaves at depth d waits there as a hidden state. The next token that
  passes d takes the waiting ones along through the next segment, in one pass. The context is no exception:
  its upper layers run only when some token needs them. Outputs and depths are those of `none`, up to
  float rounding, at the cost of a cached model. Waiting positions are always a contiguous run that ends
  where the passing token begins, so one causal mask with an offset serves.
- `none`: the paper's protocol. No cache; the whole prefix runs up to the exit again for every token.
- `propagate`: the exit's hidden state fills the skipped layers' keys and values (CALM, Schuster et al.
  2022). Approximate; the context runs through all layers first.
- `full`: no exits; every layer runs for every token.
- `verified`: the text of `full`, with any policy. A token that leaves is a draft. It waits as in `deferred`,
  until one that goes all the way takes it along; then the final layer's answer stands in its place, and from
  the first draft that was wrong on the text is made anew (self-speculative decoding: Zhang et al. 2023,
  "Draft & Verify"; LayerSkip, Elhoushi et al. 2024). It saves no layer, but passes of one position each.

In the others the LM head runs once per token, for one position, and layers above the exit do not run, unless
the context or a waiting token passes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from greencode.errors import UserError
from greencode.exits import check_exit_points, exit_points
from greencode.families import Family, Rotary, adapt
from greencode.signals import signals

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KV_MODES = ("deferred", "none", "propagate", "full", "verified")


@dataclass
class Usage:
    """Work done for one completion.

    Attributes:
        layer_calls: layers executed, whatever the number of positions in a call.
        layer_positions: positions summed over layer calls: deferred work and the context included.
        checks: times the policy was asked.
        head_calls: times the LM head ran, rules that read logits at an exit included.
        host_syncs: times the host waited for a value of the device: one for each token, one for each
            decision of a rule that looks at the state, one for each draft. On a CPU nobody waits; the
            count is the same.
        drafts, accepted: in `verified`, tokens that left early, and those of them that the final layer
            said too.
    """

    layer_calls: int = 0
    layer_positions: int = 0
    checks: int = 0
    head_calls: int = 0
    host_syncs: int = 0
    drafts: int = 0
    accepted: int = 0


class ExitView:
    """What a policy sees at an exit point of one token; nothing is computed before it is asked for.

    Asked at every exit point of every token, it is kept lean: on the bundled models a cached property
    alone would cost a tenth of a check.
    """

    __slots__ = ("_family", "_hidden", "_logits", "_observation", "_usage", "depth")

    def __init__(self, family: Family, hidden: torch.Tensor, depth: int, usage: Usage):
        self._family = family
        self._hidden = hidden
        self._usage = usage
        self._observation: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self.depth = depth

    @property
    def observation(self) -> torch.Tensor:
        """The last position's hidden state [H] after the final norm (`OBSERVATION`)."""
        if self._observation is None:
            self._observation = self._family.observe(self._hidden[0, -1])
        return self._observation

    @property
    def logits(self) -> torch.Tensor:
        """Logits [V] this exit would answer with. Costs an LM head, and is counted."""
        if self._logits is None:
            self._usage.head_calls += 1
            self._logits = self._family.logits(self.observation)
        return self._logits

    def last(self, count: int) -> torch.Tensor:
        """Logits [count, V] of the last positions, those that waited for this one included."""
        self._usage.head_calls += 1
        return self._family.logits(self._family.observe(self._hidden[0, -count:]))

    def to_host(self, value: torch.Tensor) -> np.ndarray:
        """A tensor as a float32 array of its shape. Waits for the device, and is counted."""
        self._usage.host_syncs += 1
        if value.dtype != torch.float32 or not value.is_cpu:
            value = value.float().cpu()
        return value.numpy()


OBSERVATION = "final_norm"
"""Name of the observation's definition, stored with every agent: `Family.observe` of the last position."""


class Policy(Protocol):
    """Decides at every exit point passed, the final layer excepted, whether a token leaves there."""

    def leaves(self, view: ExitView) -> bool:
        """True to leave at `view.depth`."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits; the default is greedy.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k, top_p: keep the k likeliest tokens; keep the smallest set of probability p. None: all.
        repetition_penalty: above 1 makes tokens of the text so far less likely (CTRL).
        seed: of the request's own generator.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for ok, fault in (
            (self.temperature >= 0, "temperature must be 0 or more"),
            (self.top_k is None or self.top_k >= 1, "top_k must be 1 or more"),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p must lie in (0, 1]"),
            (self.repetition_penalty > 0, "repetition_penalty must be above 0"),
        ):
            if not ok:
                raise UserError(f"{fault}.")


def _argmax(logits: torch.Tensor, text: Sequence[int]) -> torch.Tensor:
    return logits.argmax()


class _Chooser:
    """Applies a `Sampling` with transformers' own processors."""

    def __init__(self, sampling: Sampling, device: torch.device):
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.greedy = sampling.temperature == 0
        self.processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self.greedy:
            self.processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k is not None:
                self.processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p is not None and sampling.top_p < 1:
                self.processors.append(TopPLogitsWarper(sampling.top_p))
            self.generator = torch.Generator(device).manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor, text: Sequence[int]) -> torch.Tensor:
        """Token id, one number on the device, for logits [V] after the ids of `text`."""
        if self.processors:
            ids = torch.tensor([text], device=logits.device)
            logits = self.processors(ids, logits[None].float())[0]
        if self.greedy:
            return logits.argmax()
        return torch.multinomial(logits.float().softmax(-1), 1, generator=self.generator)


class _LayerCache:
    """Keys and values of one request, preallocated; layers may hold different numbers of positions."""

    def __init__(self, family: Family, capacity: int):
        heads, size = family.kv_shape()
        self._shape = (1, heads, capacity, size)
        self._keys: list[torch.Tensor | None] = [None] * family.depth
        self._values: list[torch.Tensor | None] = [None] * family.depth
        self.lengths = [0] * family.depth

    def update(self, keys, values, layer, *args, **kwargs):
        if self._keys[layer] is None:
            self._keys[layer] = keys.new_empty(self._shape)
            self._values[layer] = values.new_empty(self._shape)
        start = self.lengths[layer]
        end = self.lengths[layer] = start + keys.shape[2]
        self._keys[layer][:, :, start:end] = keys
        self._values[layer][:, :, start:end] = values
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]


@dataclass(frozen=True)
class Token:
    """One generated token and the layers run to decide it."""

    id: int
    depth: int


class _Request:
    """State of one completion: positions, cache, waiting hidden states. Lives as long as the request."""

    def __init__(
        self,
        engine: Engine,
        kv: str,
        capacity: int,
        policy: Policy | None,
        choose: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
        drafts: int,
    ):
        self.family = engine.family
        self.policy = policy
        self.choose = choose
        self.drafts = drafts
        self.points = engine.exit_points if kv != "full" else (engine.family.depth,)
        self.kv = kv
        self.usage = Usage()
        self.positions = torch.arange(capacity, device=self.family.device)[None]
        self.rotary = self.family.rotary(self.positions)
        self.cache = None if kv == "none" else _LayerCache(self.family, capacity)
        self.length = 0
        self._masked: tuple[int, int] | None = None
        self._masks: dict[int | None, torch.Tensor | None] = {}
        # waiting[i]: hidden states, oldest first, that stopped at the i-th exit point.
        self.waiting: list[list[torch.Tensor]] = [[] for _ in self.points]

    def _run(self, first: int, last: int, hidden: torch.Tensor, start: int) -> torch.Tensor:
        """Layers first..last-1 over the positions from `start` on."""
        count = hidden.shape[1]
        positions = self.positions[:, start : start + count]
        rotary = _slice(self.rotary, start, count)
        for layer in range(first, last):
            mask = self._mask(start, count, self.family.sliding_window(layer))
            hidden = self.family.run(layer, hidden, positions, mask, self.cache, rotary)
        self.usage.layer_calls += last - first
        self.usage.layer_positions += (last - first) * count
        return hidden

    def _mask(self, start: int, count: int, window: int | None) -> torch.Tensor | None:
        """The causal mask, made once for the segments that the same positions run one after another."""
        if self._masked != (start, count):
            self._masked, self._masks = (start, count), {}
        if window not in self._masks:
            self._masks[window] = _causal_mask(start, count, window, self.family.device)
        return self._masks[window]

    def step(self, ids: torch.Tensor, text: Sequence[int], room: int) -> tuple[list[Token], torch.Tensor]:
        """Take new ids [1, P] in; the next tokens, at most `room`, and the ids that the next step takes."""
        if self.kv == "verified":
            return self._verified(ids, text, room)
        if self.kv == "none":
            self.length = 0
        view, depth = self._advance(ids, self.policy)
        chosen = self.choose(view.logits, text)
        # The id stays on the device for the next step; the host reads it, and sends nothing back.
        new = chosen.view(1, 1)
        self.usage.host_syncs += 1
        return [Token(int(chosen), depth)], torch.cat([ids, new], dim=1) if self.kv == "none" else new

    def _verified(self, ids, text, room) -> tuple[list[Token], torch.Tensor]:
        """Drafts up to a token that goes all the way; of all of them what the final layer says, up to the
        first draft that was wrong.
        """
        drafts: list[torch.Tensor] = []
        while True:
            # The last token goes all the way, so that no draft is left over.
            may_leave = len(drafts) < min(self.drafts, room - 1)
            view, depth = self._advance(ids, self.policy if may_leave else None)
            if depth == self.family.depth:
                break
            ids = view.logits.argmax().view(1, 1)
            drafts.append(ids)
        tokens: list[Token] = []
        for logits, draft in zip(view.last(len(drafts) + 1), [*map(int, drafts), None], strict=True):
            chosen = self.choose(logits, [*text, *(token.id for token in tokens)])
            tokens.append(Token(int(chosen), depth))
            if tokens[-1].id != draft:
                break
        accepted = len(tokens) - 1
        self.usage.drafts += len(drafts)
        self.usage.accepted += accepted
        self.usage.host_syncs += len(drafts) + len(tokens)
        self._forget(len(drafts) - accepted)
        return tokens, chosen.view(1, 1)

    def _advance(self, ids: torch.Tensor, policy: Policy | None) -> tuple[ExitView, int]:
        """Take new ids [1, P] in; the view of the last position at its exit, and the depth."""
        start, self.length = self.length, self.length + ids.shape[1]
        hidden = self.family.embed(ids, self.positions[:, start : self.length])
        below, prefill = 0, ids.shape[1] > 1
        answer: tuple[ExitView, int] | None = None
        for index, depth in enumerate(self.points):
            hidden = self._run(below, depth, hidden, start)
            below = depth
            if answer is None:
                view = ExitView(self.family, hidden, depth, self.usage)
                if depth == self.family.depth:
                    return view, depth
                if policy is not None:
                    self.usage.checks += 1
                    if policy.leaves(view):
                        answer = view, depth
                        if self.kv == "none":
                            return answer
                        if self.kv in ("deferred", "verified"):
                            self.waiting[index].append(hidden)
                            return answer
                        if not prefill:
                            self._propagate(depth, hidden, start)
                            return answer
            if self.waiting[index]:
                hidden = torch.cat([*self.waiting[index], hidden], dim=1)
                start = self.length - hidden.shape[1]
                self.waiting[index] = []
        assert answer is not None
        return answer

    def _forget(self, count: int) -> None:
        """Drop the last `count` positions; none may wait."""
        self.length -= count
        self.cache.lengths = [min(length, self.length) for length in self.cache.lengths]

    def _propagate(self, depth: int, hidden: torch.Tensor, start: int) -> None:
        rotary = _slice(self.rotary, start, hidden.shape[1])
        for layer in range(depth, self.family.depth):
            self.family.propagate(layer, hidden, self.cache, rotary)


def _slice(rotary: Rotary | None, start: int, count: int) -> Rotary | None:
    if rotary is None:
        return None
    return rotary[0][:, start : start + count], rotary[1][:, start : start + count]


def _causal_mask(start: int, count: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Boolean mask [1, 1, count, start + count] for queries from `start` on; None where sdpa needs none."""
    total = start + count
    slides = window is not None and total > window
    if not slides and (count == 1 or start == 0):
        return None
    query = torch.arange(start, total, device=device)[:, None]
    key = torch.arange(total, device=device)
    mask = key <= query
    if slides:
        mask &= key > query - window
    return mask[None, None]


@dataclass
class Completion:
    """A finished completion: ids, depths, text where a tokenizer is at hand, and the work done."""

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    text: str | None = None
    stopped: str = "length"


class Engine:
    """Early-exit decoding over one model; batch size 1.

    An engine keeps nothing between requests: policy, threshold and sampling are call arguments, and each
    request has its own cache. Two engines may share one model.

    Args:
        model: a causal LM of a supported family, in evaluation mode.
        points: exit points, ending at N; the paper's rule if None.
        tokenizer: needed for stop strings and for `Completion.text`.
        max_cache_bytes: requests that would need more for keys, values and waiting states are refused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        points: Sequence[int] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_cache_bytes: int | None = None,
    ):
        self.family = adapt(model)
        self.exit_points = (
            exit_points(self.family.depth) if points is None
            else check_exit_points(tuple(points), self.family.depth)
        )  # fmt: skip
        self.tokenizer = tokenizer
        self.max_cache_bytes = max_cache_bytes

    def cache_bytes(self, tokens: int) -> int:
        """Most bytes a request of `tokens` positions can hold in keys, values and waiting states."""
        heads, size = self.family.kv_shape()
        per_position = 2 * self.family.depth * heads * size + self.family.hidden_size
        return tokens * per_position * self.family.dtype.itemsize

    def _fit(self, context: Sequence[int], new_tokens: int, overflow: str) -> list[int]:
        """The context that will be read.

        Raises:
            UserError: empty, longer than the model's window (unless `overflow` is `truncate`, which keeps
                the end), or over the cap on memory.
        """
        context = list(context)
        if not context:
            raise UserError("The context is empty; give at least one token.")
        if new_tokens < 1:
            raise UserError(f"new_tokens is {new_tokens}; ask for at least 1.")
        window = self.family.window
        if window is not None and len(context) + new_tokens > window:
            if overflow != "truncate" or new_tokens >= window:
                raise UserError(
                    f"Context and completion take {len(context)} + {new_tokens} tokens, more than the "
                    f"model's {window}; shorten the context or ask for truncation."
                )
            context = context[new_tokens - window :]
        need = self.cache_bytes(len(context) + new_tokens)
        if self.max_cache_bytes is not None and need > self.max_cache_bytes:
            raise UserError(
                f"The request needs up to {need} bytes of cache, more than the {self.max_cache_bytes} "
                "allowed; shorten the context."
            )
        return context

    def stream(
        self,
        context: Sequence[int],
        new_tokens: int,
        policy: Policy | None = None,
        kv: str = "deferred",
        sampling: Sampling | None = None,
        stop: Iterable[str] = (),
        eos: Iterable[int] = (),
        overflow: str = "refuse",
        into: Completion | None = None,
        drafts: int = 1,
    ) -> Iterator[Token]:
        """Generate token by token; stop iterating to cancel.

        Args:
            context: token ids.
            new_tokens: at most this many.
            policy: asked at each exit point before the final layer; None never leaves.
            kv: one of `KV_MODES`.
            stop: strings that end the completion (it keeps them); they need a tokenizer.
            eos: ids that end the completion (they are kept).
            overflow: `refuse` or `truncate` (drop the oldest tokens) a context beyond the model's window.
            into: filled while tokens come, so that a cancelled request still has its account.
            drafts: in `verified`, tokens that may wait before one is made to go all the way.
        """
        if kv not in KV_MODES:
            raise UserError(f"KV mode {kv!r} is unknown; choose one of {', '.join(KV_MODES)}.")
        stop, eos = tuple(stop), frozenset(eos)
        if stop and self.tokenizer is None:
            raise UserError("Stop strings need a tokenizer.")
        context = self._fit(context, new_tokens, overflow)
        into = into or Completion()
        return self._stream(context, new_tokens, policy, kv, sampling, stop, eos, into, drafts)

    def _stream(self, context, new_tokens, policy, kv, sampling, stop, eos, done, drafts) -> Iterator[Token]:
        device = self.family.device
        choose = _argmax if sampling is None else _Chooser(sampling, device)
        with torch.inference_mode():
            request = _Request(self, kv, len(context) + new_tokens, policy, choose, drafts)
        done.usage = request.usage
        ids = torch.tensor([context], device=device)
        while len(done.tokens) < new_tokens:
            # Inference mode is entered per step: a suspended generator must not leave it on in its caller.
            with torch.inference_mode():
                room = new_tokens - len(done.tokens)
                tokens, ids = request.step(ids, context + done.tokens, room)
            for token in tokens:
                done.tokens.append(token.id)
                done.depths.append(token.depth)
                yield token
                if token.id in eos:
                    done.stopped = "eos"
                    return
                if stop:
                    text = self.tokenizer.decode(done.tokens)
                    if any(s in text for s in stop):
                        done.stopped = "stop"
                        return

    def complete(self, context: Sequence[int], new_tokens: int, *args, **kwargs) -> Completion:
        """`stream` to its end. With a tokenizer the text comes too, cut before the first stop string."""
        done = Completion()
        stop = tuple(kwargs.pop("stop", ()))
        for _ in self.stream(context, new_tokens, *args, stop=stop, into=done, **kwargs):
            pass
        if self.tokenizer is not None:
            text = self.tokenizer.decode(done.tokens)
            cuts = [text.find(s) for s in stop if s in text]
            done.text = text[: min(cuts)] if cuts else text
        return done

    @torch.inference_mode()
    def trace(
        self,
        contexts: Sequence[Sequence[int]],
        new_tokens: int,
        leaves: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Greedy completions of several contexts at once, seen from every exit point.

        All layers run for every token, whoever writes the text. Exact early-exit decoding (`deferred`,
        `none`) has the same states, so the text of a rule is the answers of the exit points it leaves at.

        Args:
            leaves: of observations float32 [B, E, H] at one token: whether each exit point would leave,
                bool [B, E]. The text goes on with the first one's answer; where there is none, and without
                `leaves`, with the final layer's.

        Returns:
            observations float32 [B, new_tokens, E, H] at the E exit points before the final layer;
            tokens int64 [B, new_tokens, E + 1]: what each exit point, the final layer last, would answer
            after the text so far; signals float32 [B, new_tokens, E, S], how sure the exit points are of
            that. All of it is what `stream` shows a policy that passes there (contexts are padded on the
            left and masked).
        """
        family, device = self.family, self.family.device
        contexts = [self._fit(context, new_tokens, "refuse") for context in contexts]
        longest = max(len(context) for context in contexts)
        pads = torch.tensor([longest - len(context) for context in contexts], device=device)
        ids = torch.tensor(
            [[0] * (longest - len(context)) + list(context) for context in contexts], device=device
        )
        cache = _BatchCache(family.depth)
        observations, tokens, certainty = [], [], []
        start = 0
        for _ in range(new_tokens):
            total = start + ids.shape[1]
            columns = torch.arange(start, total, device=device)
            positions = (columns[None] - pads[:, None]).clamp(min=0)
            rotary = family.rotary(positions)
            masks = {}
            hidden = family.embed(ids, positions)
            seen = []
            for layer in range(family.depth):
                window = family.sliding_window(layer)
                if window not in masks:
                    masks[window] = _padded_mask(columns, total, pads, window)
                hidden = family.run(layer, hidden, positions, masks[window], cache, rotary)
                if layer + 1 in self.exit_points:
                    seen.append(family.observe(hidden[:, -1]))
            states = torch.stack(seen, dim=1)
            logits = family.logits(states)
            answers = logits.argmax(-1)
            certainty.append(signals(logits[:, :-1]).cpu().numpy())
            observations.append(states[:, :-1].float().cpu().numpy())
            tokens.append(answers.cpu().numpy())
            ids, start = answers[:, -1:], total
            if leaves is not None:
                # The final layer takes whoever has not left.
                left = np.pad(leaves(observations[-1]), ((0, 0), (0, 1)), constant_values=True)
                ids = answers.gather(1, torch.from_numpy(left.argmax(axis=1)).to(device)[:, None])
        return np.stack(observations, axis=1), np.stack(tokens, axis=1), np.stack(certainty, axis=1)


class _BatchCache:
    """Growing keys and values of a batch, for `Engine.trace`."""

    def __init__(self, depth: int):
        self._stored: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * depth

    def update(self, keys, values, layer, *args, **kwargs):
        if self._stored[layer] is not None:
            old_keys, old_values = self._stored[layer]
            keys, values = torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)
        self._stored[layer] = keys, values
        return keys, values


def _padded_mask(columns: torch.Tensor, total: int, pads: torch.Tensor, window: int | None) -> torch.Tensor:
    """Boolean mask [B, 1, len(columns), total]: causal, blind to left padding, within the window.

    A padding row sees itself, so that no row of the softmax is empty.
    """
    key = torch.arange(total, device=columns.device)
    mask = key <= columns[:, None]
    if window is not None:
        mask = mask & (key > columns[:, None] - window)
    real = key[None, None] >= pads[:, None, None]
    return ((mask[None] & real) | (key == columns[:, None])[None])[:, None]


def as_policy(rule: Callable[[ExitView], bool]) -> Policy:
    """A policy from any callable, for experiments."""

    class _Callable:
        def leaves(self, view: ExitView) -> bool:
            return bool(rule(view))

    return _Callable()
