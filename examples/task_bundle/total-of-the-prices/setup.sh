#!/bin/bash
# Runs as the desktop's user before the episode. Text that is larger is easier to read on a screenshot.
set -e
mkdir -p ~/.config/gtk-3.0
echo 'textview { font-size: 20pt; }' > ~/.config/gtk-3.0/gtk.css
