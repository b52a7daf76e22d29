"""What every role shares: configuration, channels, codec, metrics, run folder. Knows no role and no engine."""
