"""A cross entropy over what all segments made becomes one of each segment's: text in, text out."""

from __future__ import annotations

import pytest
from graphs import rewritten

from rmtc.passes.graph.split_losses import SplitLosses

LOSS = """\
input x: float64[2, 4, 8]
input labels: int64[2, 7]
parameter w: float64[5, 8]
%0 = sin(x)
%1 = slice.Tensor(x, 1, 0, 3)
%2 = cos(%1)
%3 = cat([%0, %2], 1)
%4 = linear(%3, w)
%5 = reshape(%4, [14, 5])
%6 = reshape(labels, [14])
%7 = cross_entropy_loss(%5, %6)
return output = %7
"""
READ = LOSS.replace("return output = %7", "%8 = exp(%3)\nreturn output = [%7, %8]")
SHIFTED = """\
input x: float64[2, 4, 8]
input labels: int64[2, 6]
parameter w: float64[5, 8]
%0 = sin(x)
%1 = slice.Tensor(x, 1, 0, 3)
%2 = cos(%1)
%3 = cat([%0, %2], 1)
%4 = linear(%3, w)
%5 = slice.Tensor(%4, 1, 0, 6)
%6 = transpose.int(%5, 1, 2)
%7 = cross_entropy_loss(%6, labels, None, 2)
return output = %7
"""

MEAN = """\
%0 = reshape(labels, [14])
%1 = sin(x)
%2 = linear(%1, w)
%3 = reshape(%2, [8, 5])
%4 = slice.Tensor(labels, 1, 0, 4)
%5 = reshape(%4, [8])
%6 = cross_entropy_loss(%3, %5, None, 2, -100, 0.0)
%7 = slice.Tensor(x, 1, 0, 3)
%8 = cos(%7)
%9 = linear(%8, w)
%10 = reshape(%9, [6, 5])
%11 = slice.Tensor(labels, 1, 4, 7)
%12 = reshape(%11, [6])
%13 = cross_entropy_loss(%10, %12, None, 2, -100, 0.0)
%14 = stack([%6, %13])
%15 = sum(%14)
%16 = ne.Scalar(labels, -100)
%17 = sum(%16)
%18 = div.Tensor(%15, %17)
return output = %18
"""

SPLIT = {
    "a mean": (LOSS, MEAN),
    "a mean without one class, smoothed": (
        LOSS.replace("loss(%5, %6)", "loss(%5, %6, None, 1, 2, 0.25)"),
        MEAN.replace("-100, 0.0", "2, 0.25").replace("-100", "2"),
    ),
    "a sum that leaves out the last position": (
        SHIFTED,
        """\
%0 = new_full(labels, [2, 1], -100)
%1 = cat([labels, %0], 1)
%2 = sin(x)
%3 = linear(%2, w)
%4 = transpose.int(%3, 1, 2)
%5 = slice.Tensor(%1, 1, 0, 4)
%6 = cross_entropy_loss(%4, %5, None, 2, -100, 0.0)
%7 = slice.Tensor(x, 1, 0, 3)
%8 = cos(%7)
%9 = linear(%8, w)
%10 = transpose.int(%9, 1, 2)
%11 = slice.Tensor(%1, 1, 4, 7)
%12 = cross_entropy_loss(%10, %11, None, 2, -100, 0.0)
%13 = stack([%6, %12])
%14 = sum(%13)
return output = %14
""",
    ),
}


@pytest.mark.parametrize("case", SPLIT)
def test_a_loss_of_all_segments_is_one_of_each(case: str) -> None:
    before, after = SPLIT[case]
    assert rewritten(SplitLosses(gradients=False).apply, before) == after


KEPT = {
    "logits that are read": LOSS.replace("output = %7", "output = [%7, %4]"),
    "a concatenation that is read": READ,
    "neighbours": LOSS.replace("%4 = linear(%3, w)", "%4 = roll(%3, [1], [1])").replace("5]", "8]"),
    "a norm over positions": LOSS.replace("linear(%3, w)", "softmax.int(%3, 1)").replace("5]", "8]"),
    "weights of classes": SHIFTED.replace("None, 2", "w0, 2").replace("input x", "parameter w0: float64[5]\ninput x"),
    "labels made of the logits": LOSS.replace("reshape(labels, [14])", "argmax(%5, -1)"),
    "labels in a buffer": LOSS.replace("input labels", "buffer labels"),
}


@pytest.mark.parametrize("case", KEPT)
def test_other_losses_stay_whole(case: str) -> None:
    assert rewritten(SplitLosses(gradients=False).apply, KEPT[case]) == KEPT[case][KEPT[case].index("%0") :]


def test_a_concatenation_that_is_read_is_kept_once_where_gradients_are_asked_for() -> None:
    after = rewritten(SplitLosses(gradients=True).apply, READ)
    assert after.count("cross_entropy_loss(") == 2 and after.count(" = cat(") == 1
