"""Text of bodies: `torch/` and `triton/` emit it. Rules that group an operation are in `torch/rules.py`."""
