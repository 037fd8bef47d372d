"""S2-Attn and its relatives: attention patterns as data, one block-causal primitive, and its transformers backend."""
