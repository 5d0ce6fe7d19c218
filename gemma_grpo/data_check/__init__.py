"""`gemma-grpo data check`: what is in a dataset that spoils training or should not be in it. Reads loaded rows; changes none."""
