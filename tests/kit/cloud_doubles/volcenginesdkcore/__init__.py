"""Double of Volcengine's base package."""


class Configuration:
    @classmethod
    def set_default(cls, configuration: object) -> None:
        pass
