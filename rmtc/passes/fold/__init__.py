"""Find the loop: flat programs of a few segments become one periodic loop of cells."""
