"""Ground floor of the house: parameters, sharding, training, checkpoints, configs; on it, sparse transformers."""
