"""Double of Volcengine's package of scaling, which desktop-env imports and does not use."""
