"""`deskrl sweep`: runs the arms of an experiment with several seeds, and compares them at equal environment steps."""
