"""`deskrl top RUN`: the figures of the Grafana dashboards in a terminal, read from the roles' metrics ports.

`scrape` reads the ports, `timeseries` computes rates and quantiles, `panels` selects the figures, and `dashboard` draws
them.
"""

from deskrl.analysis.top.dashboard import top

__all__ = ["top"]
