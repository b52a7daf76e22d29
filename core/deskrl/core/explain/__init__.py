"""`deskrl explain`: what a run would do, need and take, before anything of it starts."""
