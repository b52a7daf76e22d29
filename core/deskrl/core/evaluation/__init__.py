"""`deskrl eval` and `deskrl compare`: what a checkpoint can do on a list of tasks, and which of two can do more.

`play` runs the roles, `record` keeps what came of each episode, `summary` counts it, `comparison` holds two side by
side.
"""
