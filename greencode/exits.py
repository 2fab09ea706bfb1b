"""Where a model may be left, and how much each exit weighs in fine-tuning (paper, section III-D).

A depth is the number of layers run, 1..N; the full model is depth N.
"""

from __future__ import annotations

from greencode.errors import UserError

FIRST_EXIT = 4
STRIDE_FIRST_HALF = 2
STRIDE_SECOND_HALF = 4


def exit_points(layers: int) -> tuple[int, ...]:
    """The paper's exit points for a model of `layers` layers, the final layer included.

    First exit at 4, every 2nd layer up to N/2, every 4th from there, the final layer always:
    28 layers give 4 6 8 10 12 14 | 18 22 26 | 28.

    Raises:
        UserError: if the model has fewer layers than the first exit.
    """
    if layers < FIRST_EXIT:
        raise UserError(
            f"A model of {layers} layers has no exit points: the first exit is at layer {FIRST_EXIT}."
        )
    half = layers // 2
    first = range(FIRST_EXIT, half + 1, STRIDE_FIRST_HALF)
    start = (first[-1] if first else FIRST_EXIT - STRIDE_SECOND_HALF) + STRIDE_SECOND_HALF
    return (*first, *range(start, layers, STRIDE_SECOND_HALF), layers)


def check_exit_points(points: list[int] | tuple[int, ...], layers: int) -> tuple[int, ...]:
    """`points` as a tuple, if they ascend, lie in 1..N and end at N.

    Raises:
        UserError: naming the offending exit.
    """
    points = tuple(points)
    for point in points:
        if not 1 <= point <= layers:
            raise UserError(
                f"Exit {point} is outside the model's layers 1..{layers}; choose exit points within them."
            )
    if not points or list(points) != sorted(set(points)) or points[-1] != layers:
        raise UserError(
            f"Exit points {list(points)} must ascend without repeats and end at the final layer {layers}."
        )
    return points


def lite_weights(
    points: tuple[int, ...],
    budgets: tuple[float, float, float] = (0.7, 0.2, 0.1),
    decay: float = 0.9,
) -> tuple[float, ...]:
    """Weight w_i of each exit's loss in Eq. 1, one per exit point, summing to 1 (Fig. 3).

    `budgets` are shared out over the exits of the first half, of the second half, and the final
    layer; within a half the weights fall geometrically by `decay`. A half without exits leaves its
    budget to the others in proportion, a case the paper's models do not have.
    """
    layers = points[-1]
    groups = (
        [p for p in points[:-1] if 2 * p <= layers],
        [p for p in points[:-1] if 2 * p > layers],
        [layers],
    )
    weights: list[float] = []
    for group, budget in zip(groups, budgets, strict=True):
        ratios = [decay**i for i in range(len(group))]
        weights += [budget * ratio / sum(ratios) for ratio in ratios]
    total = sum(weights)
    return tuple(weight / total for weight in weights)
