"""The one exception a person is meant to read. Knows nothing of where it is shown: `deskrl.core.cli` does that."""


class UserError(Exception):
    """Bad input or a missing thing: one line that names it, and the mend. Ends the command with exit status 2.

    Args:
        message: what is wrong, naming the file, key, port or package.
        mend: what the reader can do about it, as an imperative.
    """

    def __init__(self, message: str, mend: str) -> None:
        super().__init__(f"{message}; {mend}")
        self.message = message
        self.mend = mend


_EXTRAS = {
    "actor": "'deskrl[actor]'",
    "inference": "'deskrl[inference]' (without a GPU: 'deskrl[inference-cpu]')",
    "learner": "'deskrl[learner]'",
    "wandb": "'deskrl[wandb]'",
}


def missing_package(name: str, role: str) -> UserError:
    """The refusal of a role that needs a Python package which is not there; any other role means deskrl's own needs."""
    return UserError(f"the package {name} is not installed", f"pip install {_EXTRAS.get(role, 'deskrl')}")
