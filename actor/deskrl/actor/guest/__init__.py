"""What runs inside a desktop: a session (X server, window manager, message bus) and the server that drives it.

Started by the host's interpreter inside the sandbox with the standard library, python-xlib and, for PNG only, Pillow;
nothing of this package imports another part of deskrl, so that it starts in a few dozen milliseconds.
"""
