"""Segments by what their operations compute: programs as text in, loops as text out."""

from __future__ import annotations

from textwrap import dedent

import pytest
from programs import Text

from rmtc.errors import RefusedError
from rmtc.ir.program import Program
from rmtc.passes.pipeline import reroll


def folded(write: object, segments: int = 3) -> str:
    """The body of the loop that two runs of so many segments, and of one more, are folded into."""
    sizes = (segments, 2, 4), (segments + 1, 5, 2)
    runs = [(write(Text(*each), each[0]), *each) for each in sizes]  # type: ignore[operator]
    loop, _ = reroll(runs, frozenset({"text"}), frozenset(), 4)
    loop.verify()
    text = str(loop)
    return text[: text.index("segment 0:")] + text[text.index("segment s >=") :]


def recurrent(text: Text, segments: int, inside: bool) -> Program:
    """Each layer adds what it gave for the segment before; one layer after another, or one segment after another."""
    zeros = text.add("new_zeros(text, [4])")
    memories, pieces = [zeros, zeros], [text.piece(s) for s in range(segments)]
    cells = [(s, layer) for s in range(segments) for layer in (0, 1)]
    for s, layer in sorted(cells, key=lambda cell: cell[::-1]) if inside else cells:
        hidden = text.add(f"linear({pieces[s]}, layers.{layer}.w)")
        memories[layer] = pieces[s] = text.add(f"add.Tensor({hidden}, {memories[layer]})")
    return text.program(output=text.add(f"cat([{', '.join(pieces)}], 1)"))


def test_the_order_of_segments_and_layers_does_not_matter() -> None:
    by_segment = folded(lambda text, segments: recurrent(text, segments, False))
    assert by_segment == dedent("""\
        before the loop:
               %0 = new_zeros(text, [4])
        segment s >= 2:
           pro %0 = slice.Tensor(text, 1, 4*s, 4*s + T)
            l0 %1 = linear(%0, layers.0.w)
            l0 %2 = add.Tensor(%1, s-1.%2)
            l1 %3 = linear(%2, layers.1.w)
            l1 %4 = add.Tensor(%3, s-1.%4)
        after the loop:
               %0 = cat([every s: s.%4], 1)
        return output = after.%0""")
    assert folded(lambda text, segments: recurrent(text, segments, True)) == by_segment


def test_memories_that_are_equal_in_the_first_segment_are_told_apart() -> None:
    """Both begin as the projected text. Then one adds to itself, and the other takes the sine of what both were."""

    def write(text: Text, segments: int) -> Program:
        one = other = outputs = ""
        for s in range(segments):
            hidden = text.add(f"linear({text.piece(s)}, layers.0.w)")
            if s:
                one, other = (
                    text.add(f"add.Tensor({hidden}, {one})"),
                    text.add(f"sin({text.add(f'mul.Tensor({one}, {other})')})"),
                )
                hidden = text.add(f"add.Tensor({one}, {other})")
            else:
                one, other = text.add(f"tanh({hidden})"), text.add(f"tanh({hidden})")
            outputs += f"{', ' if s else ''}{text.add(f'linear({hidden}, layers.1.w)')}"
        return text.program(output=text.add(f"cat([{outputs}], 1)"))

    body = folded(write)
    assert "add.Tensor(%3, s-1." in body and "mul.Tensor(s-1." in body


def test_a_counter_goes_from_segment_to_segment() -> None:
    """It has no part in the text: each segment adds one to it, and it is a result."""

    def write(text: Text, segments: int) -> Program:
        count = text.add("zeros([1], dtype=float64)")
        memory = text.add("new_zeros(text, [4])")
        for s in range(segments):
            hidden = text.add(f"linear({text.piece(s)}, layers.0.w)")
            memory = text.add(f"add.Tensor({hidden}, {memory})")
            memory = text.add(f"mul.Tensor({text.add(f'linear({memory}, layers.1.w)')}, {text.add(f'cos({count})')})")
            count = text.add(f"add.Tensor({count}, 1)")
        return text.program(output=memory, steps=count)

    for segments in (3, 4):
        body = folded(write, segments)
        assert "= add.Tensor(s-1.%" in body and "return steps = s[-1].%" in body
        assert "add.Tensor" not in body.partition("segment s >=")[0]  # the first segment adds, too


def test_what_all_segments_make_alike_is_made_once() -> None:
    """Weights of the width are the same in each segment, positions are its own; so is a mask that sizes alone give."""

    def write(text: Text, segments: int) -> Program:
        memory = text.add("new_zeros(text, [4])")
        for s in range(segments):
            piece = text.piece(s)
            mask = text.add("arange(4, dtype=float64)")
            mask = text.add(f"mul.Tensor({mask}, {text.add('sum.dim_IntList(head, [0])')})")
            place = text.add(f"arange.start({4 * s + 1}, {4 * s + 5}, dtype=float64)")
            hidden = text.add(f"linear({text.add(f'mul.Tensor({piece}, {mask})')}, layers.0.w)")
            hidden = text.add(f"add.Tensor({hidden}, {place})")
            memory = text.add(f"add.Tensor({text.add(f'linear({hidden}, layers.1.w)')}, {memory})")
        return text.program(output=memory)

    before, _, body = folded(write).partition("segment s >=")
    assert "sum.dim_IntList(head" in before and "sum.dim_IntList(head" not in body
    assert "arange(4" in before and "arange.start(4*s + 1, 4*s + 5" in body


def test_what_all_segments_read_of_the_first_ones_positions_is_made_once() -> None:
    """The first part of a table is the first segment's, and one that every segment reads beside its own."""

    def write(text: Text, segments: int) -> Program:
        memory = text.add("new_zeros(text, [4])")
        for s in range(segments):
            own = text.add(f"slice.Tensor(head, 0, {s}, {s + 1})")
            hidden = text.add(f"linear({text.add(f'add.Tensor({text.piece(s)}, {own})')}, layers.0.w)")
            hidden = text.add(f"mul.Tensor({hidden}, {text.add('slice.Tensor(head, 0, 0, 1)')})")
            memory = text.add(f"add.Tensor({text.add(f'linear({hidden}, layers.1.w)')}, {memory})")
        return text.program(output=memory)

    before, _, body = folded(write).partition("segment s >=")
    assert "slice.Tensor(head, 0, 0, 1)" in before and "slice.Tensor(head, 0, s, s + 1)" in body


def test_what_has_no_counterpart_in_the_longer_run_is_named() -> None:
    def write(text: Text, segments: int) -> Program:
        memory = text.add("new_zeros(text, [4])")
        for s in range(segments):
            hidden = text.add(f"linear({text.piece(s)}, layers.0.w)")
            memory = text.add(f"{'mul' if segments == 3 and s == 2 else 'add'}.Tensor({hidden}, {memory})")
            memory = text.add(f"linear({memory}, layers.1.w)")
        return text.program(output=memory)

    with pytest.raises(RefusedError, match=r"segment 3 of a run of 4 does not run what .* runs: add.* in place of mul"):
        folded(write)


def test_a_part_outside_of_the_loop_that_grows_is_named() -> None:
    def write(text: Text, segments: int) -> Program:
        memory = text.add("new_zeros(text, [4])")
        for s in range(segments):
            hidden = text.add(f"linear({text.piece(s)}, layers.0.w)")
            memory = text.add(f"linear({text.add(f'add.Tensor({hidden}, {memory})')}, layers.1.w)")
        for _ in range(segments):
            memory = text.add(f"tanh({memory})")
        return text.program(output=memory)

    said = (
        "the part after the loop over 4 segments does not run what .* over 3 segments runs: tanh.* in place of nothing"
    )
    with pytest.raises(RefusedError, match=said):
        folded(write)


def test_results_that_are_equal_are_tensors_of_their_own() -> None:
    """Before the loop, and after it: a caller may write to one of them."""

    def write(text: Text, segments: int) -> Program:
        marks = [text.add("new_zeros(text, [4])") for _ in range(3)]
        memory = marks[0]
        for s in range(segments):
            hidden = text.add(f"linear({text.piece(s)}, layers.0.w)")
            memory = text.add(f"linear({text.add(f'add.Tensor({hidden}, {memory})')}, layers.1.w)")
        sums = [text.add(f"sum({memory})") for _ in range(2)]
        return text.program(output=memory, one=marks[1], other=marks[2], total=sums[0], again=sums[1])

    returned = [line.split(" = ")[1] for line in folded(write).splitlines() if line.startswith("return ")]
    assert len(returned) == len(set(returned)) == 5


@pytest.mark.parametrize("between", range(7))
def test_what_is_made_before_the_loop_is_in_the_order_of_each_run(between: int) -> None:
    """A value that only one run has the like of is not ordered by the other run's numbers."""

    def write(text: Text, segments: int) -> Program:
        memory = text.add("new_zeros(text, [4])")
        pieces = []
        for s in range(segments):
            memory = text.add(f"add.Tensor({text.add(f'linear({text.piece(s)}, layers.0.w)')}, {memory})")
            pieces.append(memory)
        whole = text.add(f"cat([{', '.join(pieces)}], 1)")
        counter = text.add(f"new_zeros(text, [{2 * text.length + 3}])")
        for _ in range(between):
            whole = text.add(f"tanh({whole})")
        return text.program(
            output=text.add(f"add.Tensor({whole}, {text.add('new_zeros(text, [4])')})"), counter=counter
        )

    assert ", before.%2)" in folded(write)
