"""`vlm checkpoint`: what a checkpoint is, and in what two of them differ. Reads, and writes nothing."""
