"""Double of botocore."""
