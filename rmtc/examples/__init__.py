"""Recurrent-memory models as their users write them: nothing here knows of the compiler."""
