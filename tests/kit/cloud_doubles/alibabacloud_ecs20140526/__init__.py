"""Double of Alibaba Cloud's package of ECS."""
