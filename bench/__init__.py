"""How fast fastllm is on this machine, beside its peers and the machine's own limits: ``python -m bench SUITE``."""
