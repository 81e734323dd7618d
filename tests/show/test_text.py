"""What `rmtc explain` prints for answers made by hand: whole texts, and what a reader must find in them."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from answers import HIDDEN, MEMORY, TOP, armt, rmt

from rmtc.errors import Location
from rmtc.ir.cells import Cell, Dependence
from rmtc.ir.explanation import CellClass, Certificate, Explanation
from rmtc.ir.formula import L, layer_symbol, place
from rmtc.ir.schedule import Schedule
from rmtc.show.cycle import follow
from rmtc.show.refusal_text import refusal_text

GOLDEN = Path(__file__).parents[1] / "support" / "golden"


@pytest.mark.parametrize(("name", "answer"), [("explain_armt", armt(5, 3)), ("explain_rmt", rmt(5, 3))])
def test_the_whole_text(name: str, answer: Explanation) -> None:
    assert f"{answer}\n" == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("answer", [armt(), rmt(), armt(1, 1), rmt(1, 1), armt(500, 128), rmt(500, 128)])
def test_lines_are_plain_and_short(answer: Explanation) -> None:
    for line in str(answer).splitlines():
        assert len(line) <= 110
        assert line == line.rstrip()
        assert line.isascii()
        assert line.isprintable()


def test_long_paths_words_and_names_stay_on_the_page() -> None:
    far = Location("/elsewhere/" + "a_long_folder_name/" * 8 + "model.py", 1234, "forward")
    wide = replace(HIDDEN, tensor="x" * 150, producer="word " * 60, location=far)
    answer = replace(rmt(), dependences=(wide, TOP), cycle=(wide, TOP), location=far, remedy="do " * 80)
    assert max(map(len, str(answer).splitlines())) <= 110


def test_each_term_is_explained_before_it_is_used() -> None:
    text = str(armt())
    for term, meaning in [
        ("cell", "One such run is a cell"),
        ("class", "form a class"),
        ("distance vector", "Each dependence has a distance vector (ds, dl)"),
        ("step ", "A schedule gives each cell a step"),
        ("makespan", "The number of steps, the makespan"),
        ("critical path", "the chain is a longest one, the critical path"),
    ]:
        body = text[text.index("The loop") :]
        assert meaning in " ".join(body.split())
        assert body.index(term) >= body.index(meaning.split()[0])


def test_the_schedule_is_compared_with_the_sequential_order() -> None:
    text = " ".join(str(armt(33, 16)).split())
    assert text.startswith("ArmtLlama: 48 steps instead of 528, proven legal and best possible")
    assert "S + L - 1 = 48; one cell after another takes S * L = 528" in text
    assert "Step 24, for example, runs s9.l15, s10.l14, s11.l13, ..., s24.l0 (class B) at once." in text
    assert "No step holds more than 16 cells." in text


def test_the_example_is_a_step_that_runs_several_cells() -> None:
    rng, said = random.Random(5), 0
    for _ in range(200):
        layers, segments = rng.randint(1, 9), rng.randint(1, 40)
        rows = [["C0" if rng.random() < 0.8 else "C1" for _ in range(layers)] for _ in range(rng.randint(0, 3))]
        strip = rng.choice([1, 1, 2, 3])
        a, b = rng.choice([0, 1, 2, 5, L] if strip == 1 else [1, 2, 11]), rng.choice([0, 1, 1, 2])
        schedule = Schedule(a, b, layers, segments, tuple(map(tuple, rows)), strip=strip)
        text = " ".join(str(replace(armt(segments, layers), schedule=schedule)).split())
        found = re.search(r"Step (\d+), for example, runs (.+?) at once\.", text)
        steps = {step.time: [group for group in step.groups if group.cells] for step in schedule.steps()}
        if found is None:
            assert min(sum(len(group.cells) for group in groups) for groups in steps.values()) < 2
            continue
        runs = []
        for group in steps[int(found[1])]:
            names = [str(cell) for cell in group.cells]
            runs.append(", ".join(names if len(names) < 5 else [*names[:3], "...", names[-1]]))
            runs[-1] += f" (class {group.cell_class})"
        assert found[2] == " and ".join(runs)
        said += 1
    assert said > 100


def test_one_segment_gains_nothing() -> None:
    text = " ".join(str(armt(1, 16)).split())
    assert "For so short a call that is no gain." in text
    assert "for example" not in text


def test_one_is_singular() -> None:
    one = replace(armt(1, 1), dependences=(), classes=(CellClass("C0", "layer", 1, "all s, all l"),), segment_length=1)
    certificate = Certificate(critical_path="s0.l0", bound="1", optimal=True)
    schedule = Schedule(0, 0, 1, 1, stage_classes={"epilogue": ("E0",)})
    text = " ".join(str(replace(one, certificate=certificate, schedule=schedule)).split())
    assert "ArmtLlama: a single segment gains nothing; 1 step for S of them" in text
    assert "S = 1 segment through L = 1 layer each" in text and "S * L = 1 layer run." in text
    assert "C0 layer 1 operation all s" in text
    assert "the makespan, is 1; one cell" in text
    assert "It has 1 cell, so no schedule" in text
    assert "prologue" not in text and "at step 0. An epilogue runs in the step of its segment's last layer" in text
    assert str(schedule).startswith("Schedule of 1 segment (S) through 1 layer (L)")


def test_places_are_named_for_both_ends_of_a_dependence() -> None:
    text = str(armt())
    assert "made at  armt.py:131 in write  layers.{l} memory update" in text
    assert "read at  armt.py:119 in read   layers.{l} memory read" in text


def test_of_many_tensors_the_names_are_shown() -> None:
    many = tuple(replace(MEMORY, tensor=f"state.{i}") for i in range(9))
    text = str(replace(armt(), dependences=(HIDDEN, *many)))
    assert text.count("made at  ") == 1 + 4
    assert "and in the same way: state.4, state.5, state.6, state.7, state.8" in text


def test_a_dependence_of_some_layers_says_so() -> None:
    text = str(replace(armt(), dependences=(HIDDEN, replace(MEMORY, layers=(1, L - 1)))))
    assert "layers.{l}.A, read by layers 1 to L - 1 only" in text


def test_a_bound_below_the_makespan_is_not_called_optimal() -> None:
    certificate = Certificate(critical_path="s0.l0 -> ...", bound="L*floor((S - 1)/2) + L", optimal=False)
    answer = replace(armt(6, 4), schedule=Schedule(2, 1, 4, 6), certificate=certificate)
    text = " ".join(str(answer).split())
    assert "14 steps instead of 24, proven legal " in text
    assert "It has L * floor((S - 1)/2) + L = 12 cells, so no schedule of whole cells has fewer steps." in text
    assert "Whether there is one in between is not known" in text
    assert "optimal" not in text
    seven = replace(answer, segments=7)
    assert "For this call the schedule has exactly as many" in " ".join(str(seven).split())


def test_a_certificate_alone_has_formulas_and_no_numbers_of_a_call() -> None:
    text = " ".join(str(armt().certificate).split())
    assert "It has S + L - 1 cells" in text
    assert "48" not in text


def test_a_refusal_alone_tells_the_cycle_the_place_and_the_remedy() -> None:
    answer = rmt(33, 16)
    text = " ".join(refusal_text(answer).split())
    assert "s0.l0 -> s0.l1 -> ... -> s0.l15 (0, 1)" in text
    assert "s0.l15 -> s1.l0 (1, -(L-1)) memory made at rmt.py:88" in text
    assert "Once through it takes L = 16 steps" in text
    assert "S segments take S * L = 528 steps" in text
    assert answer.reason is not None
    assert answer.remedy is not None
    assert answer.reason in text
    assert answer.remedy in text
    assert "What depends on what" not in text


def test_a_cycle_whose_every_edge_is_named_reads_the_same() -> None:
    assert str(replace(rmt(33, 16), cycle=(HIDDEN,) * 15 + (TOP,))) == str(rmt(33, 16))


def test_a_refusal_that_is_no_cycle_does_not_claim_the_sequential_order_is_best() -> None:
    answer = replace(rmt(), cycle=(), certificate=None, reason="the counter `step` grows by 1, then by 3")
    text = str(answer)
    assert text.startswith("RmtLlama: refused, nothing shorter than its 528 layer runs in sequence could be proven")
    assert "one after another: no" not in text
    assert "the counter `step` grows by 1, then by 3" in text


def test_a_cycle_through_distances_that_vary_shows_the_chain_instead() -> None:
    updater = Dependence((1, layer_symbol - L), tensor="memory")
    certificate = Certificate(critical_path="s0.l0 -> ... -> s(S-1).l(L-1)", bound="L*S", optimal=True)
    text = str(replace(rmt(), dependences=(HIDDEN, updater), cycle=(HIDDEN, updater), certificate=certificate))
    assert "s0.l0 -> ... -> s(S-1).l(L-1)" in text
    assert "(1, l - L)  memory" in text


def test_without_dependences_everything_runs_at_once() -> None:
    answer = replace(armt(), dependences=(), certificate=None, schedule=Schedule(0, 0, 16, 33))
    assert "all of them can run at once" in " ".join(str(answer).split())


@pytest.mark.parametrize(
    ("cycle", "layers", "length", "advance", "path"),
    [
        ((HIDDEN, TOP), 4, L, 1, "s0.l0 s0.l1 s0.l2 s0.l3 s0.l3 s1.l0"),
        ((TOP, HIDDEN), 3, L, 1, "s0.l2 s1.l0 s1.l0 s1.l1 s1.l2"),
        ((HIDDEN, HIDDEN, Dependence((1, -2))), 5, 3, 1, "s0.l0 s0.l1 s0.l2 s0.l2 s1.l0"),
        ((MEMORY,), 1, 1, 1, "s0.l0 s1.l0"),
        ((Dependence((1, 2)), Dependence((1, -1)), Dependence((1, -1))), 3, 3, 3, "s0.l0 s1.l2 s1.l2 s2.l1 s3.l0"),
    ],
)
def test_a_cycle_is_followed(
    cycle: tuple[Dependence, ...], layers: int, length: object, advance: int, path: str
) -> None:
    once = follow(cycle, layers)
    assert once is not None
    assert once.length == length
    assert once.advance == advance
    assert " ".join(str(cell) for turn in once.turns for cell in turn.cells) == path


@pytest.mark.parametrize(
    ("cycle", "layers"),
    [
        ((), 3),
        ((HIDDEN,), 3),
        ((Dependence((0, 0)),), 3),
        ((HIDDEN, Dependence((0, -1))), 3),
        ((Dependence((1, 2)),), 5),
        ((HIDDEN, Dependence((1, -5))), 3),
        ((HIDDEN, Dependence((1, layer_symbol - L))), 3),
    ],
)
def test_what_is_no_cycle_on_the_grid_is_not_followed(cycle: tuple[Dependence, ...], layers: int) -> None:
    assert follow(cycle, layers) is None


def test_a_place_is_named_from_the_working_directory_or_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert place(Location(str(tmp_path / "models" / "a.py"), 3, "f")) == "models/a.py:3 in f"
    assert place(Location("/usr/lib/python3/site-packages/pkg/a.py", 3)) == "pkg/a.py:3"
    assert place(Location("a.py", 3)) == "a.py:3"
    assert place(Location("/elsewhere/a.py", 3)) == "/elsewhere/a.py:3"


def test_cells_print_as_mathematics() -> None:
    assert str(Cell(2, 1)) == "s2.l1"
    assert str(TOP) == "(1, -(L-1)) memory"
