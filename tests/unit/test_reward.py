import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from greencode.errors import UserError
from greencode.reward import CONTINUE, EXIT, Reward

# Five exit points before the final layer, so the largest distance is 5.
EXITS = 5
REWARD = Reward(alpha=0.5, beta=0.8, gamma=0.6, epsilon=0.1)


@pytest.mark.parametrize(
    ("current", "optimal", "correct", "expected"),
    [
        (2, 2, True, 1.0),  # branch 1: right token, optimal exit
        (3, 2, True, -1 / 5 * 0.5),  # branch 2: right token, one too late
        (4, 0, True, -4 / 5 * 0.5),
        (1, 2, False, -1 / 5 * 0.8),  # branch 3: wrong token, one too early
        (0, 5, False, -5 / 5 * 0.8),  # only the final layer knows
        (4, 1, False, -0.1),  # branch 4: past the optimal exit, wrong again
    ],
)
def test_exit_reward_by_hand(current, optimal, correct, expected):
    assert REWARD.exit_reward(current, optimal, correct, EXITS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("current", "optimal", "expected"),
    [
        (1, 2, 1.0),  # branch 1: not there yet
        (4, 5, 1.0),  # on to the final layer, rightly
        (2, 2, -1 / 5 * 0.6),  # branch 2: should have left here
        (3, 1, -3 / 5 * 0.6),
        (4, 0, -5 / 5 * 0.6),  # on to the final layer, as wrongly as can be
    ],
)
def test_continue_reward_by_hand(current, optimal, expected):
    assert REWARD.continue_reward(current, optimal, EXITS) == pytest.approx(expected)


@pytest.mark.parametrize(("current", "optimal", "correct"), [(1, 2, True), (2, 2, False)])
def test_contradictions_are_refused(current, optimal, correct):
    with pytest.raises(ValueError, match="cannot have"):
        REWARD.exit_reward(current, optimal, correct, EXITS)


# Layers between the exit points 4, 6, 8, 12, 16 and a last 20: the way is 16 in all.
COSTLY = Reward(alpha=0.5, beta=0.8, gamma=0.6, epsilon=0.1, costs=(2, 2, 4, 4, 4))


@pytest.mark.parametrize(
    ("current", "optimal", "correct", "expected"),
    [
        (2, 2, True, 1.0),
        (3, 2, True, -4 / 16 * 0.5),  # from 8 to 12
        (4, 0, True, -12 / 16 * 0.5),
        (1, 2, False, -2 / 16 * 0.8),  # from 6 to 8
        (0, 5, False, -16 / 16 * 0.8),
        (4, 1, False, -0.1),
    ],
)
def test_exit_reward_in_costs_by_hand(current, optimal, correct, expected):
    assert COSTLY.exit_reward(current, optimal, correct, EXITS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("current", "optimal", "expected"),
    [
        (1, 2, 1.0),
        (1, 1, -2 / 16 * 0.6),  # the way to the next exit point
        (3, 1, -10 / 16 * 0.6),
        (4, 0, -16 / 16 * 0.6),
    ],
)
def test_continue_reward_in_costs_by_hand(current, optimal, expected):
    assert COSTLY.continue_reward(current, optimal, EXITS) == pytest.approx(expected)


def test_the_unit_of_costs_does_not_matter_and_equal_ones_are_the_papers():
    tokens = np.random.default_rng(0).integers(0, 3, size=(200, 6))
    milliseconds = Reward(0.5, 0.8, 0.6, 0.1, costs=(34.5, 34.5, 69, 69, 69))
    np.testing.assert_allclose(milliseconds.table(tokens), COSTLY.table(tokens), atol=1e-6)
    equal = Reward(0.5, 0.8, 0.6, 0.1, costs=[3] * 5)
    np.testing.assert_allclose(equal.table(tokens), REWARD.table(tokens), atol=1e-6)


@pytest.mark.parametrize("cost", [0, -1, float("nan"), float("inf"), "1", None, True])
def test_a_cost_that_is_none_is_named(cost):
    with pytest.raises(UserError, match=f"Reward cost {cost!r} is no number above 0"):
        Reward(costs=(1, cost))


def test_costs_for_another_number_of_exit_points_are_refused():
    with pytest.raises(UserError, match="has 2 costs, but 5 segments"):
        Reward(costs=(1, 2)).table(np.zeros((3, 6), np.int64))


unit = st.floats(0, 1)


@given(
    coefficients=st.tuples(unit, unit, unit, unit),
    tokens=st.integers(2, 7).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(0, 2), min_size=width, max_size=width), min_size=1, max_size=6
        )
    ),
    costs=st.none() | st.lists(st.floats(0.01, 100), min_size=6, max_size=6),
)
def test_table_equals_the_scalar_functions_and_stays_in_range(coefficients, tokens, costs):
    tokens = np.array(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reward = Reward(*coefficients, costs=costs and costs[: tokens.shape[1] - 1])
    exits = tokens.shape[1] - 1
    table = reward.table(tokens)
    assert table.shape == (len(tokens), exits, 2)
    assert table.dtype == np.float32
    for row, rewards in zip(tokens.tolist(), table, strict=True):
        optimal = row.index(row[-1])
        for current in range(exits):
            going = reward.continue_reward(current, optimal, exits)
            leaving = reward.exit_reward(current, optimal, row[current] == row[-1], exits)
            assert rewards[current, CONTINUE] == pytest.approx(going, abs=1e-6)
            assert rewards[current, EXIT] == pytest.approx(leaving, abs=1e-6)
    assert ((table == 1) | ((table >= -1) & (table <= 0))).all()


def test_table_keeps_leading_axes():
    assert REWARD.table(np.zeros((3, 4, 6), np.int64)).shape == (3, 4, 5, 2)


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma", "epsilon"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "1", None, True])
def test_coefficients_out_of_range_are_named(name, value):
    with pytest.raises(UserError, match=name):
        Reward(**{name: value})


def test_alpha_above_beta_warns():
    with pytest.warns(UserWarning, match="alpha <= beta"):
        Reward(alpha=1.0, beta=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Reward(alpha=0.5, beta=0.5)
