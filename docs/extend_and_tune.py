"""Extends a model's context eightfold and tunes it on long text, in the manner of LongChat.

    python docs/extend_and_tune.py MODEL TEXT OUT [STEPS]

MODEL: a folder with a causal LM and its tokenizer. TEXT: a file of at least eight times the model's context. OUT: where the tuned
model goes; it loads as any other. STEPS: of one row each (default 200).
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastllm

source, text, out = sys.argv[1:4]
steps = int(sys.argv[4]) if len(sys.argv) > 4 else 200
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(device)
length = 8 * model.config.max_position_embeddings
print(fastllm.extend_context(model, length, "yarn"))
print(fastllm.patch(model))
getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
model.train()

tokens = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
if len(tokens) < length:
    sys.exit(f"{text} has {len(tokens)} tokens; {length} are needed")
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
for step in range(steps):
    start = torch.randint(0, len(tokens) - length + 1, ()).item()
    row = tokens[start : start + length].unsqueeze(0).to(device)
    loss = model(input_ids=row, labels=row, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f} over {length} tokens", flush=True)
fastllm.unpatch(model)
model.save_pretrained(out)
tokenizer.save_pretrained(out)
