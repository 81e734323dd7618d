"""Rewrite traced FX graphs: remove regions, give parts of tensors one spelling, split losses."""
