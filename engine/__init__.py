"""The forward pass: model, paged KV cache, attention, scheduler, sampler, runner. No network."""
