"""A matrix of models × data sets × budgets × policies × seeds: every cell a run, all of them one table.

``matrix.py`` says what a matrix file may hold and ``read.py`` reads it; ``cells.py`` makes its cells and
``cell_folder.py`` knows which are done; ``execute.py`` trains one, ``engine.py``, ``local.py`` and
``on_ray.py`` say where, and ``drive.py`` hands them out; ``rows.py`` and ``results.py`` collect what came out.
Importing this package needs the extra ``compare``.
"""
