"""The garbage collector of processes that analyse many models."""

from __future__ import annotations

import gc


def keep_away() -> None:
    """Let no collection go over what is there now, and have few of them over what is made from now on.

    What an analysis makes would be gone over again and again: a fifth of the time of all tests. And where objects are
    frozen, rmtc asks at the end of each analysis how many. That counts all of them, which takes 60 ms for those of all
    tests, a third of the time of many a test. The answer here is that there are some.
    """
    gc.set_threshold(50_000, 20, 50)
    gc.freeze()
    vars(gc)["get_freeze_count"] = lambda: 1
