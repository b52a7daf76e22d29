"""Metrics of the learner: records, metrics.jsonl and trackers, Prometheus, result files."""
