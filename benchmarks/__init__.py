"""What boft_ext costs beside the frozen model, LoRA, OFT and other forms of BOFT: ``python -m benchmarks --help``."""
