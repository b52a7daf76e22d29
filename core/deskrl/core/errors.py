"""UserError: the exception for mistakes that the user can correct."""


class UserError(Exception):
    """Invalid input or a missing requirement, shown to the user in one line; the command ends with exit status 2.

    Args:
        message: what is wrong and why, with the name of the file, key, port or package.
        hint: what the user can do about it, in the imperative.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message} (hint: {hint})")
        self.message = message
        self.hint = hint


_EXTRAS = {
    "actor": "'deskrl[actor]'",
    "gymnasium": "'deskrl[gymnasium]'",
    "data": "'deskrl[data]'",
    "inference": "'deskrl[inference]' (without a GPU: 'deskrl[inference-cpu]')",
    "learner": "'deskrl[learner]'",
    "mlflow": "'deskrl[mlflow]'",
    "tensorboard": "'deskrl[tensorboard]'",
    "wandb": "'deskrl[wandb]'",
}


def missing_package(name: str, role: str) -> UserError:
    """Return the error for a Python package that a role needs and that is not installed.

    Args:
        name: name of the package.
        role: role or extra that needs the package; for any other name, the hint is to install deskrl itself.
    """
    return UserError(f"the package {name} is not installed", f"pip install {_EXTRAS.get(role, 'deskrl')}")
