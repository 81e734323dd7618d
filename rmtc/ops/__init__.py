"""The operators of the library `rmtc`: norms, rotary embeddings, rolls and linear maps of a group.

How an operation of torch is grouped is said in `codegen/torch/rules.py`.
"""
