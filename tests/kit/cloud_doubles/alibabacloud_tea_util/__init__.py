"""Double of Alibaba Cloud's helpers."""
