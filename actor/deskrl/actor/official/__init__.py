"""OSWorld's own evaluators, from its package `desktop-env`, in an environment and a process of their own.

Their dependencies clash with deskrl's engines, so nothing here is imported from that package: `environment` installs
it, `process` runs inside it, and `client` speaks to that process in lines of JSON.
"""
