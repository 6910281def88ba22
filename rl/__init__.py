"""Post-training of the models built in `moe`: objectives, rollouts, rewards. Nothing is implemented here yet."""
