"""Draw segment-recurrent models at random and hold what rmtc makes of them against eager, for hours.

``python -m tests.fuzz --minutes 60 --seed 0``, from the root of the repository.
"""
