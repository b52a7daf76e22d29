"""`deskrl explain`: predicts batch sizes, memory, disk, time and cost of a run, and compares it with ARPO."""
