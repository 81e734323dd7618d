"""Decide the order: dependences become a proven schedule, which a checker holds against another run."""
