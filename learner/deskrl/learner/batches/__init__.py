"""Batches: packs episodes into rows and collates rows with their screenshots into micro-batches."""
