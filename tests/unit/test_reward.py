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


unit = st.floats(0, 1)


@given(
    coefficients=st.tuples(unit, unit, unit, unit),
    tokens=st.integers(2, 7).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(0, 2), min_size=width, max_size=width), min_size=1, max_size=6
        )
    ),
)
def test_table_equals_the_scalar_functions_and_stays_in_range(coefficients, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reward = Reward(*coefficients)
    tokens = np.array(tokens)
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
