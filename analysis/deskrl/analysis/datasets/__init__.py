"""Datasets: export of a run's episodes as Parquet, and import of recorded episodes as demonstrations."""
