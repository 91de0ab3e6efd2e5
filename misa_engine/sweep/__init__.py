"""``misa sweep``: a search over settings of ``misa train``, one run in a process of its own for each trial.

Optuna (extra ``[sweep]``) proposes the settings and ends runs that fall behind. The study lies in a sqlite file, so
that several processes may work at it and a killed one costs no more than its trial.
"""
