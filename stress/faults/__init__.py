"""Faults: what is done to the program, what it promises for that, and what happens."""
