"""Double of the helpers."""

import json
from typing import Any


class Client:
    @staticmethod
    def to_jsonstring(value: Any) -> str:
        return json.dumps(value)
