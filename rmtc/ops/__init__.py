"""The operators of the library `rmtc`: norms, rotary embeddings, rolls and linear maps of a group."""
