"""Lay out a run: a wavefront program and the sizes of texts become a launch program, which a checker replays."""
