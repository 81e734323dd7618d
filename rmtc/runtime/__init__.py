"""Running a rewritten loop: plans, weights, guards, and what stands in for the user's forward."""
