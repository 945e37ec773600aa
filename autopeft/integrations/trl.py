"""Train a candidate with TRL's trainers: SFT, DPO, GRPO and others built on transformers' Trainer.

```python
from autopeft.integrations.trl import get_peft_model, train, training_arguments


def evaluate(candidate, *, seed, report):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), candidate, seed=seed)
    args = DPOConfig(**training_arguments(candidate, seed=seed, output_dir="out"))
    trainer = DPOTrainer(
        model, args=args, train_dataset=pairs["train"], eval_dataset=pairs["validation"],
        processing_class=tokenizer,
    )
    return train(trainer, report, metric="rewards/accuracies", test=pairs["test"])
```

The reference model of DPO, and of GRPO with `beta` above 0, is the base model without the adapter;
no second model is loaded.
"""

from autopeft.integrations.transformers import (
    create_optimizer,
    get_peft_model,
    train,
    training_arguments,
)

__all__ = ["create_optimizer", "get_peft_model", "train", "training_arguments"]
