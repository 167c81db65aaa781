"""Extends a model's context eightfold and tunes it: python docs/extend_and_tune.py MODEL TEXT OUT [STEPS]

MODEL: a folder with a causal LM and its tokenizer. TEXT: a file of at least eight times its context. STEPS: of one row (200).
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastllm

if len(sys.argv) < 4:
    sys.exit(__doc__)
source, text, out, steps = *sys.argv[1:4], int(sys.argv[4]) if len(sys.argv) > 4 else 200
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(
    device
)  # in bf16 small steps would be lost
length = 8 * model.config.max_position_embeddings
tokens = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
if len(tokens) < length:
    sys.exit(f"{text} has {len(tokens)} tokens; {length} are needed")
print(fastllm.extend_context(model, length, "yarn"))
print(fastllm.patch(model))
getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
for step in range(steps):
    start = torch.randint(0, len(tokens) - length + 1, ()).item()
    row = tokens[start : start + length].unsqueeze(0).to(device)
    with torch.autocast(device, torch.bfloat16):
        loss = model(input_ids=row, labels=row, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.4f} over {length} tokens", flush=True)
fastllm.unpatch(model)
model.save_pretrained(out)
tokenizer.save_pretrained(out)
