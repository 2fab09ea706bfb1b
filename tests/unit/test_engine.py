import copy
import gc
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from greencode.engine import KV_MODES, Completion, Engine, ExitView, Sampling, Usage, as_policy
from greencode.errors import UserError
from greencode.exits import exit_points
from greencode.policies import AgentExit, FixedExit

DEPTH = 6
POINTS = (1, 2, 4, DEPTH)
FEW = settings(max_examples=20, deadline=None, derandomize=True, database=None)
CONTEXTS = st.lists(st.integers(0, 60), min_size=1, max_size=14)
DEPTHS = st.lists(st.sampled_from(POINTS), min_size=1, max_size=9)


def context_of(size: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(61), k=size)


class Script:
    """Leaves token t at `depths[t]`; never asked at the last depth, so a token begins at the first exit."""

    def __init__(self, depths: Sequence[int], first: int = POINTS[0]):
        self.depths = depths
        self.first = first
        self.token = -1

    def leaves(self, view: ExitView) -> bool:
        self.token += view.depth == self.first
        return view.depth >= self.depths[self.token]


class Watching:
    """Decides by what it sees, about half the time to leave, and keeps it."""

    def __init__(self, seed: int):
        self.seed = seed
        self.seen: list[tuple[int, torch.Tensor]] = []

    def leaves(self, view: ExitView) -> bool:
        self.seen.append((view.depth, view.observation))
        return bool(view.observation[self.seed % len(view.observation)] > 0)


@dataclass
class Counts:
    """Positions of each call of each layer, and rows and output of each call of the LM head."""

    layers: list[list[int]]
    head_rows: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[Counts]:
    """Counts what runs by hooks on the model's own modules."""
    layers = model.get_decoder().layers
    counts = Counts([[] for _ in layers])

    def head_hook(module, inputs, output):
        counts.head_rows.append(inputs[0].numel() // inputs[0].shape[-1])
        counts.logits.append(output)

    hooks = [model.get_output_embeddings().register_forward_hook(head_hook)] + [
        layer.register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append(inputs[0].shape[1]))
        for layer, calls in zip(layers, counts.layers, strict=True)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def generated(model: PreTrainedModel, context: list[int], new_tokens: int) -> list[int]:
    """What transformers' own greedy search says."""
    ids = torch.tensor([context])
    done = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    return done[0, len(context) :].tolist()


def read_at(model: PreTrainedModel, context: list[int], depth: int, new_tokens: int) -> list[int]:
    """Greedy decoding from `hidden_states[depth]` of the whole model over the whole text, every token."""
    decoder, text = model.get_decoder(), list(context)
    norm = decoder.norm if hasattr(decoder, "norm") else decoder.final_layer_norm
    for _ in range(new_tokens):
        with torch.no_grad():
            done = model(torch.tensor([text]), output_hidden_states=True, use_cache=False)
            if depth == DEPTH:
                logits = done.logits[0, -1]
            else:
                state = done.hidden_states[depth][0, -1]
                state = state if norm is None else norm(state)
                if getattr(decoder, "project_out", None) is not None:
                    state = decoder.project_out(state)
                logits = model.get_output_embeddings()(state)
        text.append(int(logits.argmax()))
    return text[len(context) :]


# Exactness


@FEW
@given(context=CONTEXTS, depths=DEPTHS)
def test_deferred_is_none(model, context, depths):
    engine = Engine(model, POINTS)
    with counted(model) as slow:
        expected = engine.complete(context, len(depths), Script(depths), kv="none")
    with counted(model) as fast:
        found = engine.complete(context, len(depths), Script(depths))
    assert found.tokens == expected.tokens
    assert found.depths == expected.depths == depths
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(slow.logits), rtol=0, atol=1e-5)


@FEW
@given(context=CONTEXTS, seed=st.integers(0, 31), new_tokens=st.integers(1, 9))
def test_deferred_is_none_for_rules_that_look(model, context, seed, new_tokens):
    engine = Engine(model, POINTS)
    slow, fast = Watching(seed), Watching(seed)
    expected = engine.complete(context, new_tokens, slow, kv="none")
    found = engine.complete(context, new_tokens, fast)
    assert (found.tokens, found.depths) == (expected.tokens, expected.depths)
    assert [depth for depth, _ in fast.seen] == [depth for depth, _ in slow.seen]
    states = [torch.stack([state for _, state in policy.seen]) for policy in (fast, slow)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)


@FEW
@given(context=CONTEXTS, data=st.data())
def test_deferred_is_none_for_any_exit_points(model, context, data):
    points = sorted(data.draw(st.sets(st.integers(1, DEPTH - 1), min_size=1)) | {DEPTH})
    depths = data.draw(st.lists(st.sampled_from(points), min_size=1, max_size=6))
    engine = Engine(model, points)
    found, expected = (
        engine.complete(context, len(depths), Script(depths, points[0]), kv=kv) for kv in ("deferred", "none")
    )
    assert (found.tokens, found.depths) == (expected.tokens, expected.depths)


@FEW
@given(context=CONTEXTS, new_tokens=st.integers(1, 12))
def test_full_is_generate(model, context, new_tokens):
    done = Engine(model, POINTS).complete(context, new_tokens, FixedExit(1), kv="full")
    assert done.tokens == generated(model, context, new_tokens)
    assert done.depths == [DEPTH] * new_tokens
    assert done.usage.checks == 0


@pytest.mark.parametrize("depth", POINTS)
def test_fixed_reads_the_hidden_state_of_its_depth(model, depth):
    engine, context = Engine(model, POINTS), context_of(11)
    expected = read_at(model, context, depth, 8)
    for kv in ("deferred", "none", "propagate"):
        assert engine.complete(context, 8, FixedExit(depth), kv=kv).tokens == expected, kv


def test_agent_of_threshold_one_is_full(model, make_agent):
    engine, context = Engine(model, POINTS), context_of(9)
    policy = AgentExit(make_agent(32, POINTS), threshold=1)
    full = engine.complete(context, 10, kv="full")
    for kv in ("deferred", "none", "propagate"):
        done = engine.complete(context, 10, policy, kv=kv)
        assert (done.tokens, done.depths) == (full.tokens, full.depths)
        assert done.usage.checks == 10 * (len(POINTS) - 1)


def test_no_policy_never_leaves(model):
    engine, context = Engine(model, POINTS), context_of(9)
    full = engine.complete(context, 8, kv="full")
    for kv in KV_MODES:
        assert engine.complete(context, 8, kv=kv).tokens == full.tokens


def agreeing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose upper layers change little, so that exits often say what the final layer says."""
    copied = copy.deepcopy(model)
    for layer in copied.get_decoder().layers[POINTS[0] :]:
        for name, weight in layer.named_parameters():
            if name.startswith(("self_attn.o_proj", "self_attn.out_proj", "mlp.down_proj", "fc2")):
                weight.mul_(0.03)
    return copied


@FEW
@given(context=CONTEXTS, depths=DEPTHS, new_tokens=st.integers(1, 9), drafts=st.integers(1, 4))
def test_verified_is_generate(model, context, depths, new_tokens, drafts):
    for one in (model, agreeing(model)):
        policy = Script(depths * 40)  # what is dropped is asked anew
        with counted(one) as counts:
            done = Engine(one, POINTS).complete(context, new_tokens, policy, "verified", drafts=drafts)
        assert done.tokens == generated(one, context, new_tokens)
        assert done.depths == [DEPTH] * new_tokens
        # Every position passes every layer, once; so do dropped drafts.
        positions = len(context) - 1 + done.usage.drafts + new_tokens - done.usage.accepted
        assert [sum(calls) for calls in counts.layers] == [positions] * DEPTH
        assert done.usage.layer_positions == DEPTH * positions
        verifications = new_tokens - done.usage.accepted
        assert done.usage.head_calls == len(counts.head_rows) == done.usage.drafts + verifications
        assert max(counts.head_rows) <= drafts + 1


def test_verified_drafts_are_accepted_and_save_passes(model):
    engine = Engine(agreeing(model), POINTS)
    full = engine.complete(context_of(20), 30, kv="full")
    done = engine.complete(context_of(20), 30, FixedExit(1), "verified", drafts=3)
    assert done.tokens == full.tokens
    assert done.usage.accepted > 0.5 * done.usage.drafts > 0
    assert done.usage.layer_calls < full.usage.layer_calls


def test_verified_ends_where_full_ends(engine):
    full = engine.complete(context_of(8), 12, kv="full").tokens
    for eos in set(full):
        done = engine.complete(context_of(8), 12, FixedExit(1), "verified", eos=[eos])
        assert done.tokens == full[: full.index(eos) + 1]
        assert (done.stopped, len(done.depths)) == ("eos", len(done.tokens))


def test_propagate_is_exact_until_a_filled_position_is_read(model):
    # The context runs through all layers, so only the third token can meet keys that were filled in.
    engine = Engine(model, POINTS)
    for seed in range(8):
        depths = random.Random(seed).choices(POINTS, k=2)
        found, exact = (
            engine.complete(context_of(12, seed), 2, Script(depths), kv=kv) for kv in ("propagate", "none")
        )
        assert found.tokens == exact.tokens


def test_propagate_diverges_measurably(tiny, record_property):
    # A third of the tokens here. Random weights are a hard case: their layers were never taught to agree.
    engine = Engine(tiny("llama"), POINTS)
    differing = total = 0
    for seed in range(12):
        depths = random.Random(seed).choices(POINTS, k=15)
        with counted(engine.family.model) as counts:
            found = engine.complete(context_of(20, seed), 15, Script(depths), kv="propagate")
        exact = engine.complete(context_of(20, seed), 15, Script(depths))
        assert torch.stack(counts.logits).isfinite().all()
        assert found.depths == exact.depths
        differing += sum(a != b for a, b in zip(found.tokens, exact.tokens, strict=True))
        total += 15
    record_property("propagate_differing_tokens", differing / total)
    assert differing / total == pytest.approx(1 / 3, abs=0.1)


# Work


def expected_positions(kv: str, depths: list[int], context: int, layer: int) -> list[int]:
    """Positions of each call of a layer (from 0), from first principles."""
    passing = [token for token, depth in enumerate(depths) if depth > layer]
    if kv == "none":
        return [context + token for token in passing]
    if kv == "deferred":
        ends = [0] + [context + token for token in passing]
        return [end - start for start, end in itertools.pairwise(ends)]
    return [context] + [1 for token in (range(1, len(depths)) if kv == "full" else passing) if token]


@FEW
@given(context=st.integers(1, 12), depths=DEPTHS, kv=st.sampled_from(sorted({*KV_MODES} - {"verified"})))
def test_layers_above_the_exit_do_not_run(model, context, depths, kv):
    with counted(model) as counts:
        done = Engine(model, POINTS).complete(context_of(context), len(depths), Script(depths), kv=kv)
    if context > 1 or kv != "propagate":  # a context of one token has nothing to prefill
        for layer, calls in enumerate(counts.layers):
            assert calls == expected_positions(kv, depths, context, layer)
    assert counts.head_rows == [1] * len(depths)
    assert done.usage == Usage(
        layer_calls=sum(map(len, counts.layers)),
        layer_positions=sum(map(sum, counts.layers)),
        checks=0 if kv == "full" else sum(POINTS.index(depth) + (depth < DEPTH) for depth in depths),
        head_calls=len(depths),
        host_syncs=len(depths),  # the script looks at nothing
    )


def test_logits_read_at_exits_are_counted(tiny):
    with counted(tiny("opt")) as counts:
        done = Engine(tiny("opt"), POINTS).complete(
            context_of(5), 3, as_policy(lambda view: view.logits.sum() > 1e9)
        )
    assert done.usage.head_calls == len(counts.head_rows) == 3 * len(POINTS)


def test_logits_of_a_taken_exit_are_computed_once(tiny):
    with counted(tiny("opt")) as counts:
        Engine(tiny("opt"), POINTS).complete(context_of(5), 3, as_policy(lambda view: view.logits.any()))
    assert counts.head_rows == [1, 1, 1]


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "opt-post-norm"])
def test_half_precision(tiny, name, dtype):
    model = type(tiny(name))(tiny(name).config).eval().to(dtype)
    model.load_state_dict(tiny(name).state_dict())
    model.generation_config.eos_token_id = None
    engine, context = Engine(model, POINTS), context_of(9)
    assert engine.complete(context, 8, kv="full").tokens == generated(model, context, 8)
    depths = [4, 1, 2, 6, 1, 1, 4, 6]
    for kv in ("deferred", "none", "propagate"):
        with counted(model) as counts:
            done = engine.complete(context, 8, Script(depths), kv=kv)
        assert done.depths == depths
        assert all(logits.dtype == dtype and logits.isfinite().all() for logits in counts.logits)
        # Before rounding can have led the texts apart.
        assert done.tokens[0] == engine.complete(context, 1, FixedExit(4), kv="none").tokens[0]


# Choosing tokens


@pytest.fixture
def engine(tiny):
    return Engine(tiny("llama"), POINTS)


def test_sampling_repeats_with_its_seed(engine):
    def sample(seed: int, kv: str = "deferred") -> list[int]:
        sampling = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=seed)
        return engine.complete(context_of(8), 10, Script([1, 4, 2, 6, 1] * 9), kv, sampling).tokens

    torch.manual_seed(1)
    first = sample(3)
    torch.manual_seed(2)
    assert sample(3) == first == sample(3, kv="none")
    assert sample(4) != first
    assert sample(3, "verified") == sample(3, "full")


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-6), Sampling(1e-4)],
    ids=["default", "top_k=1", "tiny top_p", "cold"],
)
def test_sampling_that_is_greedy(engine, sampling):
    greedy = engine.complete(context_of(8), 10).tokens
    assert engine.complete(context_of(8), 10, sampling=sampling).tokens == greedy


def test_sampling_follows_the_distribution(engine):
    context, count = context_of(8), 400
    with counted(engine.family.model) as counts:
        engine.complete(context, 1)
    wanted = (counts.logits[0] / 0.7).softmax(-1).numpy()
    drawn = [
        engine.complete(context, 1, sampling=Sampling(0.7, seed=seed)).tokens[0] for seed in range(count)
    ]
    found = np.bincount(drawn, minlength=len(wanted)) / count
    assert (np.abs(found - wanted) <= 4.5 * np.sqrt(wanted * (1 - wanted) / count) + 1 / count).all()


def test_repetition_penalty_changes_the_text(engine):
    context = context_of(8)
    plain = engine.complete(context, 15).tokens
    penalised = engine.complete(context, 15, sampling=Sampling(repetition_penalty=1.8)).tokens
    assert len(set(penalised)) > len(set(plain))


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"repetition_penalty": 0}],
    ids=str,
)
def test_invalid_sampling(values):
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling(**values)


# Ending


class Letters:
    """A tokenizer of one letter per id."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(65 + i) for i in ids)


def test_stop_strings(tiny):
    engine = Engine(tiny("llama"), POINTS, Letters())
    plain = engine.complete(context_of(8), 10)
    assert plain.text == Letters().decode(plain.tokens)
    assert plain.stopped == "length"
    stop = plain.text[3:5]
    done = engine.complete(context_of(8), 10, stop=["nowhere", stop])
    end = plain.text.index(stop)
    assert (done.text, done.stopped) == (plain.text[:end], "stop")
    assert done.tokens == plain.tokens[: end + 2]
    assert [t.id for t in engine.stream(context_of(8), 10, stop=[stop])] == done.tokens


def test_stop_strings_need_a_tokenizer(engine):
    with pytest.raises(UserError, match="tokenizer"):
        engine.stream(context_of(8), 10, stop=["x"])


def test_end_of_text(engine):
    plain = engine.complete(context_of(8), 10).tokens
    done = engine.complete(context_of(8), 10, eos=[plain[4], 60])
    assert done.tokens == plain[: plain.index(plain[4]) + 1]
    assert done.stopped == "eos"


# Streaming


def test_tokens_come_one_at_a_time(engine):
    whole = engine.complete(context_of(8), 6, FixedExit(2))
    into, seen = Completion(), []
    for count, token in enumerate(engine.stream(context_of(8), 6, FixedExit(2), into=into), 1):
        seen.append(token)
        assert into.tokens == [t.id for t in seen]
        assert into.usage.head_calls == count
    assert [t.id for t in seen] == whole.tokens
    assert [t.depth for t in seen] == whole.depths
    assert into.usage == whole.usage


def test_closing_cancels(engine):
    into = Completion()
    with counted(engine.family.model) as counts:
        stream = engine.stream(context_of(8), 10, FixedExit(4), into=into)
        next(stream)
        next(stream)
        stream.close()
    assert len(into.tokens) == len(counts.head_rows) == 2
    assert into.usage == Usage(layer_calls=8, layer_positions=4 * 9, checks=6, head_calls=2, host_syncs=2)
    assert not torch.is_inference_mode_enabled()


def test_inference_mode_does_not_leak(engine):
    for _ in engine.stream(context_of(8), 3, FixedExit(2)):
        assert not torch.is_inference_mode_enabled()
        weight = torch.ones(2, requires_grad=True)
        (2 * weight).sum().backward()
        assert weight.grad.tolist() == [2, 2]


# Refusals


def test_window(engine):
    context = context_of(60)
    assert len(engine.complete(context, 4).tokens) == 4
    with pytest.raises(UserError, match=r"60 \+ 5 tokens.*64"):
        engine.stream(context, 5)
    truncated = engine.complete(context, 15, overflow="truncate")
    assert truncated.tokens == engine.complete(context[-49:], 15).tokens
    with pytest.raises(UserError, match="more than"):
        engine.stream(context, 64, overflow="truncate")
    with pytest.raises(UserError, match="more than"):
        engine.trace([context_of(5), context], 5)


def test_memory_cap(tiny):
    model = tiny("llama")
    capped = Engine(model, POINTS, max_cache_bytes=Engine(model).cache_bytes(20))
    assert len(capped.complete(context_of(15), 5).tokens) == 5
    with pytest.raises(UserError, match="cache"):
        capped.stream(context_of(16), 5)


def test_what_makes_no_sense_is_refused_at_the_call(engine):
    with pytest.raises(UserError, match="empty"):
        engine.stream([], 5)
    with pytest.raises(UserError, match="at least 1"):
        engine.stream([1], 0)
    with pytest.raises(UserError, match="deferred, none, propagate, full, verified"):
        engine.stream([1], 5, kv="paged")


def test_exit_points_are_checked(tiny):
    assert Engine(tiny("llama")).exit_points == exit_points(DEPTH)
    for points in [(1, 2), (2, 1, 6), (0, 6), (1, 7), ()]:
        with pytest.raises(UserError):
            Engine(tiny("llama"), points)


def test_other_families_are_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match=r"gpt2.*llama, mistral, qwen2, qwen3, opt"):
        Engine(model)


def test_other_attention_is_refused():
    config = LlamaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=4, num_attention_heads=1)
    with pytest.raises(UserError, match="sdpa"):
        Engine(LlamaForCausalLM._from_config(config, attn_implementation="eager"))


# Many requests


def test_two_engines_share_one_model(model):
    one, two = Engine(model, POINTS), Engine(model, (3, DEPTH))
    first = one.complete(context_of(9, 1), 8, Script([1, 6, 2, 4] * 2)).tokens
    second = two.complete(context_of(7, 2), 8, Script([3, 3, 6, 3] * 2, 3)).tokens
    together = zip(
        one.stream(context_of(9, 1), 8, Script([1, 6, 2, 4] * 2)),
        two.stream(context_of(7, 2), 8, Script([3, 3, 6, 3] * 2, 3)),
        strict=True,
    )
    assert [(a.id, b.id) for a, b in together] == list(zip(first, second, strict=True))


def test_requests_leave_nothing_behind(engine):
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def request(kv: str) -> list[int]:
        return engine.complete(context_of(8), 6, Script([1, 6, 2, 1, 4, 6] * 9), kv=kv).tokens

    first = {kv: request(kv) for kv in KV_MODES}
    before, state = tensors(), dict(vars(engine))
    for _ in range(5):
        for kv in KV_MODES:
            stream = engine.stream(context_of(9), 6, FixedExit(1), kv=kv)
            next(stream)
            del stream  # cancelled
            assert request(kv) == first[kv]
    assert tensors() == before
    assert vars(engine) == state
