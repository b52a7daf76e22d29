"""Weight publication: transfer of the weights to inference replicas, verified by checksums and a canary."""
