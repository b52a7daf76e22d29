"""Double of Alibaba Cloud's base package."""
