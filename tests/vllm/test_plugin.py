"""The plugin: found by vLLM itself, cheap to load, and no harm to what it does not concern."""

import importlib
import json
import logging
import os
import subprocess
import sys

import pytest

from prunekit.checkpoint import widths
from prunekit.integrations import vllm as plugin

CODE = """
import json, sys, vllm
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins
before = set(sys.modules)
load_general_plugins()
load = ModelRegistry.models["LlamaForCausalLM"].load_model_cls
print(json.dumps([type(load).__name__, sorted(set(sys.modules) - before)]))
"""


def loading(plugins):
    """What vLLM's registry has after it loaded these plugins, and which modules that brought."""
    run = {"capture_output": True, "text": True, "check": True}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | {"VLLM_PLUGINS": plugins}, **run
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_vllm_finds_it_and_nothing_of_a_model_is_imported():
    found, new = loading("prunekit")
    assert found == "partial"
    assert "prunekit.integrations.vllm" in new
    assert not [name for name in new if name.startswith(("vllm.", "transformers."))]
    assert not {"prunekit.integrations.loading", "prunekit.integrations.layer_widths"} & set(new)
    assert loading("")[0] == "method"


def test_every_family_whose_widths_may_differ_is_taught():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    families = {NAMES[model_type] for model_type in widths.DECODER_LAYERS}
    assert families == {*plugin.DECODER_LAYERS, *plugin.BACKED} - {"TransformersForCausalLM"}


def test_each_class_is_vllms_own_and_taught_once():
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    loads = {name: ModelRegistry.models[name].load_model_cls for name in plugin.DECODER_LAYERS}
    plugin.register()
    for name, load in loads.items():
        assert ModelRegistry.models[name].load_model_cls is load
        assert load().__module__.startswith("vllm.model_executor.models.")
        layer = _layer(name)
        once = layer.__init__
        assert once._built_by_layer
        load()
        assert layer.__init__ is once
    for name in plugin.BACKED:
        assert ModelRegistry.models[name].load_model_cls().__name__ == "TransformersForCausalLM"


def _layer(architecture):
    module, name = plugin.DECODER_LAYERS[architecture]
    return getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)


@pytest.mark.parametrize("place", [("llama", "NoSuchLayer"), ("no_such_module", "X")])
def test_a_vllm_that_keeps_its_layers_elsewhere_still_loads_its_models(place, monkeypatch, caplog):
    from vllm.model_executor.models.llama import LlamaForCausalLM

    monkeypatch.setitem(plugin.DECODER_LAYERS, "LlamaForCausalLM", place)
    with caplog.at_level(logging.WARNING, logger="prunekit"):
        assert plugin._load(lambda: LlamaForCausalLM, "LlamaForCausalLM") is LlamaForCausalLM
    assert "LlamaForCausalLM loads with MLPs of one width only" in caplog.text
