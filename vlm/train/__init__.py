"""Train one stage: megatron-core's optimizer and schedules around `vlm.model`, resuming to the bit where it stopped."""
