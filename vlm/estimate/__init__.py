"""`vlm plan`: what a run will take, before anything of it is submitted."""
