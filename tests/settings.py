"""Settings of algorithms that learn within a second."""

SMALL = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 40, "batch_size": 32, "seed": 0, "buffer_size": 2000}
