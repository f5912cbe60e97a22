"""From a Megatron checkpoint of any stage to files that other people's tools read."""
