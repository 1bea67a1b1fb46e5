"""How any model comes to use the ops of the table: where one computes what an op computes is found in it, proven, and replaced.

`uses.py` finds the places, `planning.py` writes those that an implementation takes into the plan, `replacing.py` carries it out.
No class of model or module is known by its name.
"""
