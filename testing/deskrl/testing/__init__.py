"""Contract suites of the extension points, which the authors of extensions run with pytest on their own.

The package needs pytest.
"""

import pkgutil

import pytest

# Without it, a failed assertion of a suite would not show its values.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))
