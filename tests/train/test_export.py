"""Adapters of every stage, as plain peft and plain transformers load them."""

import pytest
import torch

from fastllm.train import config
from fastllm.train.run import Run

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "mixed", "rm", "dpo"])
def test_adapter_and_merged_model_are_the_trained_model(stage, folder, write, tmp_path):
    chats = write("chats.jsonl", [{"prompt": f"{n}?", "response": "yes " * (1 + n % 5)} for n in range(8)])
    texts = write("texts.jsonl", [{"text": f"{n} is a number"} for n in range(8)])
    pairs = write(
        "pairs.jsonl", [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no " * (1 + n % 3)} for n in range(8)]
    )
    data = {"pretrain": texts, "rm": pairs, "dpo": pairs}.get(stage, chats)
    values = {
        "stage": stage, "model": str(folder), "data": str(data), "output_dir": str(tmp_path / "runs"), "max_length": 128,
        "max_steps": 3, "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05, "export": "both",
        "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    }  # fmt: skip
    if stage == "mixed":
        values["pretrain_data"] = str(texts)
    run = Run(config.parse(values))
    ids = torch.arange(10, 30)[None]
    kind = transformers.AutoModelForSequenceClassification if stage == "rm" else transformers.AutoModelForCausalLM
    more = {"num_labels": 1} if stage == "rm" else {}
    with torch.no_grad():
        before = run.trainer.model.eval()(input_ids=ids).logits.clone()
    run.go()
    with torch.no_grad():
        base = kind.from_pretrained(folder, **more)
        adapted = peft.PeftModel.from_pretrained(base, run.folder / "final").eval()(input_ids=ids).logits
        merged = kind.from_pretrained(run.folder / "final-merged").eval()(input_ids=ids).logits
    assert (adapted - before).abs().max() > 1e-3
    assert (adapted - merged).abs().max() < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.folder / "final-merged")
    assert tokenizer.eos_token_id == run.tokenizer.eos_token_id
