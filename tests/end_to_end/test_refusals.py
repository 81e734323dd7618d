"""What is refused is told with the user's line, the reason and a remedy, and docs/refusals.md shows just that."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from refusals import REFUSALS, Refusal, message, section

PAGE = Path(__file__).parents[2] / "docs" / "refusals.md"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On tensors as small as these a second thread only waits for its turn on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def without_numbers(text: str) -> str:
    """The text but for numbers of operations, which another version of torch may change, and random numbers."""
    return re.sub(r"%\d+|\b\d+ operations|0\.\d{6,}", "n", text)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.title)
def test_the_message_has_place_reason_and_remedy(refusal: Refusal) -> None:
    error = message(refusal)
    assert refusal.reason in error.reason and error.remedy
    if refusal.line:
        source, start = inspect.getsourcelines(refusal.example)
        assert error.location is not None and error.location.file.endswith("tests/support/refusals.py")
        assert refusal.line in source[error.location.line - start]
    assert without_numbers(section(refusal, error)) in without_numbers(PAGE.read_text()), (
        "run python tests/support/refusals.py"
    )


def test_every_section_is_of_an_example() -> None:
    assert re.findall(r"^## (.*)$", PAGE.read_text(), re.M) == [refusal.title for refusal in REFUSALS]
