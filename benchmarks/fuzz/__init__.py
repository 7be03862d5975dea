"""Damaged files for every reader of trady: what is raised, how long it takes, and how much memory it asks for.

    python -m benchmarks.fuzz --files 20000
    python -m benchmarks.fuzz --reader npz --seed 3

Every file is a pure function of the seed and its number. A reader either accepts it, or refuses it with an error of
trady's (:mod:`trady.errors`); anything else is a fault. So is what takes longer than 5 s, what asks for more than
1 GiB beyond what the process has, and what ends the process.
"""
