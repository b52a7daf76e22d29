"""`deskrl top RUN`: what the dashboards show, in a terminal, read straight from the roles' metrics ports.

`window` computes rates and quantiles, `scrape` reads ports, `panels` says what is worth showing.
"""

from deskrl.core.top.watch import top

__all__ = ["top"]
