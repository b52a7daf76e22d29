"""MiniWoB++: makes tasks of its pages, and plays a page in a browser that the policy controls by mouse and keyboard."""
