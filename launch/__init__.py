"""What a user starts: the pretraining job, its configs, and scripts for clusters."""
