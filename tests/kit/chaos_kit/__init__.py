"""Fault injection into running jobs: faults drawn from a seed, the job, and checks of its results."""
