"""The exit-point rule and the LITE weights, against the paper (section III-D, Fig. 3)."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greencode.errors import UserError
from greencode.exits import check_exit_points, exit_points, lite_weights

LLAMA = (4, 6, 8, 10, 12, 14, 18, 22, 26, 28)


@pytest.mark.parametrize(
    ("layers", "points"),
    [
        (28, LLAMA),
        (32, (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)),
        (24, (4, 6, 8, 10, 12, 16, 20, 24)),
        (20, (4, 6, 8, 10, 14, 18, 20)),
        (16, (4, 6, 8, 12, 16)),
        (12, (4, 6, 10, 12)),
        (11, (4, 8, 11)),
        (8, (4, 8)),
        (7, (4, 7)),
        (5, (4, 5)),
        (4, (4,)),
    ],
)
def test_exit_points_of_the_paper_and_of_small_models(layers, points):
    assert exit_points(layers) == points


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_a_model_shallower_than_the_first_exit_has_none(layers):
    with pytest.raises(UserError, match=f"{layers} layers has no exit points.*layer 4"):
        exit_points(layers)


@given(st.integers(4, 400))
def test_exit_points_follow_the_strides(layers):
    points = exit_points(layers)
    assert check_exit_points(points, layers) == points
    for point, following in itertools.pairwise(points[:-1]):
        assert following - point == (2 if following <= layers // 2 else 4)
    assert len(points) == 1 or points[-1] - points[-2] <= 4


def test_lite_weights_of_figure_3():
    # First half: .9^0 + ... + .9^5 = 4.68559 shares .7; second: 1 + .9 + .81 = 2.71 shares .2; final: .1.
    by_hand = (
        0.7 * 1 / 4.68559,
        0.7 * 0.9 / 4.68559,
        0.7 * 0.81 / 4.68559,
        0.7 * 0.729 / 4.68559,
        0.7 * 0.6561 / 4.68559,
        0.7 * 0.59049 / 4.68559,
        0.2 * 1 / 2.71,
        0.2 * 0.9 / 2.71,
        0.2 * 0.81 / 2.71,
        0.1,
    )
    figure = (0.149394, 0.134455, 0.121009, 0.108908, 0.098018, 0.088216, 0.073801, 0.066421, 0.059779, 0.1)
    assert lite_weights(LLAMA) == pytest.approx(by_hand, rel=1e-12)
    assert lite_weights(LLAMA) == pytest.approx(figure, abs=5e-7)


def test_an_exit_at_exactly_half_depth_belongs_to_the_first_half():
    weights = lite_weights((4, 6, 8, 12, 16))
    assert weights == pytest.approx((0.7 / 2.71, 0.63 / 2.71, 0.567 / 2.71, 0.2, 0.1), rel=1e-12)


def test_budgets_and_decay_are_arguments():
    assert lite_weights((2, 4, 6, 8), (0.5, 0.3, 0.2), 0.5) == pytest.approx((1 / 3, 1 / 6, 0.3, 0.2))


@pytest.mark.parametrize(
    ("points", "weights"),
    [
        ((4,), (1.0,)),
        ((4, 8), (0.7 / 0.8, 0.1 / 0.8)),
        ((4, 5), (0.2 / 0.3, 0.1 / 0.3)),
    ],
)
def test_an_empty_half_leaves_its_budget_to_the_others_in_proportion(points, weights):
    assert lite_weights(points) == pytest.approx(weights)


@given(st.integers(4, 400))
def test_weights_are_positive_and_sum_to_one_for_any_model(layers):
    points = exit_points(layers)
    weights = lite_weights(points)
    assert len(weights) == len(points)
    assert min(weights) > 0
    assert sum(weights) == pytest.approx(1, abs=1e-12)


def test_check_exit_points_gives_a_tuple():
    assert check_exit_points([2, 5, 6], 6) == (2, 5, 6)
    assert check_exit_points([6], 6) == (6,)


@pytest.mark.parametrize(
    ("points", "fault"),
    [
        ([4, 17, 16], "Exit 17 is outside the model's layers 1..16"),
        ([0, 16], "Exit 0 is outside"),
        ([-4, 16], "Exit -4 is outside"),
        ([4, 8, 8, 16], "must ascend without repeats"),
        ([8, 4, 16], "must ascend"),
        ([4, 8], "end at the final layer 16"),
        ([], "end at the final layer 16"),
    ],
)
def test_check_exit_points_names_the_fault(points, fault):
    with pytest.raises(UserError, match=fault):
        check_exit_points(points, 16)
