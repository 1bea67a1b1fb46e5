"""Schedules: each file generates one, as a program of actions, and says in closed form what it idles and holds.

`registry` has them by the names that a config gives them. `orders` is what a generator writes, the compute actions of each rank; `messages`
makes a program of it.
"""
