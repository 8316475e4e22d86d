"""Hugging Face's ViTMAE under its own Trainer, accelerated by one line.

The rest is unchanged: the model's class and weights, the Trainer, and the checkpoints that it saves and loads.
"""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining

import fastmim


class Walls(Dataset):
    """Pictures of coloured walls as an image processor returns them: pixel_values (3, 64, 64), normalised."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        colour, noise = (torch.randn(shape, generator=generator) for shape in ((3, 1, 1), (3, 64, 64)))
        return {"pixel_values": colour + 0.1 * noise}


torch.manual_seed(0)
decoder = dict(decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4)
config = ViTMAEConfig(
    image_size=64,
    patch_size=8,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=384,
    decoder_intermediate_size=256,
    **decoder,
)
model = ViTMAEForPreTraining(config)
print(fastmim.accelerate(model))  # the one line

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        lr_scheduler_type="constant",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Walls())
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {float(entry['loss']):.4f}")
    trainer.save_model(folder)
    again = ViTMAEForPreTraining.from_pretrained(folder)  # an ordinary model, in Hugging Face's own format
    assert all(torch.equal(value, model.state_dict()[name].cpu()) for name, value in again.state_dict().items())
    print("saved and loaded")
