"""Tensors to tensors: DeepGen 1.0 (arXiv 2602.12205).

prompt + reference images -> vlm (Qwen2.5-VL, think tokens appended) -> six hidden states
-> connector (Stacked Channel Bridging) -> prompt_embeds, pooled_prompt_embeds
-> dit (SD3 MMDiT over [noisy target ; clean references]) -> velocity -> vae -> pixels
"""
