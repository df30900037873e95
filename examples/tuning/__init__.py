"""Fine-tuning with few visual tokens; see finetune.py."""
