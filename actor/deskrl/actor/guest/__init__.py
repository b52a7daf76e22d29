"""Guest server: the desktop session (X server, window manager, message bus) and the HTTP server that controls it.

Runs inside the desktop as `python -m deskrl.actor.guest`, with the standard library, python-xlib and, for PNG only,
Pillow. No module of this package imports another part of deskrl, so that it starts within tens of milliseconds.
"""
