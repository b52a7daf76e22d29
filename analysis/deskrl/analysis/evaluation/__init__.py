"""`deskrl eval` and `deskrl compare`: success rates on task lists, and the difference between two of them."""
