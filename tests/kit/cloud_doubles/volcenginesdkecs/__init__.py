"""Double of Volcengine's package of ECS."""
