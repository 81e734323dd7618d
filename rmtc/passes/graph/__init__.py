"""Rewrite traced FX graphs: remove regions, remake constants, give parts of tensors one spelling."""
