"""Import this, and transformers loads models whose MLPs differ in width by layer.

Their ``config.json`` says so under ``per_layer_config``, which transformers reads but builds no
layers by yet: without this import it refuses the model. With it ``AutoModelForCausalLM`` and all
that rests on it (Trainer, PEFT, ``device_map``) take the model as any other.
"""

from prunekit.integrations.layer_widths import install
from prunekit.integrations.loading import load, load_tokenizer

__all__ = ["load", "load_tokenizer"]

install()
