"""Analysis of runs: report, viewer, live status, explanation, environment checks, evaluation and sweeps."""
