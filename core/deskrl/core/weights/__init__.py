"""What learner and replicas do alike to move weights: buckets, checksums, communicators."""
