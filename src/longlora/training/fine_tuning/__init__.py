"""`longlora sft`: supervised fine-tuning on questions about long documents."""
