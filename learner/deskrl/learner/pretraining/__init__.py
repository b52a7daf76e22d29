"""Pretraining of a small vision-language policy from random weights on synthetic screens."""
