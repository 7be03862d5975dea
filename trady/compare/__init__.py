"""A matrix of models × data sets × budgets × policies × seeds: every cell is a run, and all make one table.

``matrix.py`` says what a matrix file may hold and ``read.py`` reads it. ``cells.py`` makes its cells, and
``cell_folder.py`` knows which are done. ``execute.py`` trains one, ``engine.py``, ``local.py`` and ``on_ray.py``
say where, and ``drive.py`` starts them. ``rows.py`` and ``results.py`` collect the results.
Importing this package needs the extra ``compare``.
"""
