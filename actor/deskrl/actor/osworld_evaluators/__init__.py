"""OSWorld's own evaluators (package `desktop-env`), installed in an environment and run in a process of their own.

Their dependencies conflict with those of deskrl, so that the package is not imported here: `evaluator_environment`
installs it, `evaluator_process` runs inside its environment, and `evaluator_client` exchanges lines of JSON with that
process.
"""
