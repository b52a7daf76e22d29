"""Weight transfer code shared by learner and replicas: buckets, checksums, communicators."""
